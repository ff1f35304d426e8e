"""For lessons in which the learner writes the property.

Who complains of everything has found nothing, and who says nothing has let nothing pass: so a
wrong kind is found only by a property that lets the right ones pass, and a right one is let pass
only by a property that finds something.
"""


def must_find(live, kind, right_kinds):
    """Fails unless the property complains of this kind in `live`, and of none that is right."""
    for right in right_kinds:
        must_not_complain(live, right)
    if not complains(live, kind):
        raise AssertionError(f"your property let a wrong one pass: {kind.__doc__}")


def must_let_pass(live, kind, wrong_kinds):
    """Fails if the property complains of this kind, or never complains of anything."""
    must_find_one(live, wrong_kinds)
    must_not_complain(live, kind)


def must_not_complain(live, right):
    """Fails, and says so, where the property complains of what is right."""
    try:
        live(right)
    except AssertionError as error:
        said = f"; it says: {error}" if str(error) else ""
        raise AssertionError(
            f"your property complains of {right.__name__}, which is right{said}"
        ) from error


def must_find_one(live, wrong_kinds):
    """Fails unless the property complains, in `live`, of at least one that is wrong."""
    if not any(complains(live, kind) for kind in wrong_kinds):
        raise AssertionError("a property that finds nothing wrong says nothing of what is right")


def complains(live, kind):
    """Whether the property finds something; not where the kind breaks by itself before."""
    try:
        live(kind)
    except AssertionError:
        return True
    except NotImplementedError:
        raise
    except Exception:
        return False
    return False
