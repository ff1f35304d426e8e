"""The course: lessons whose tasks are parts of this very package, written again by the learner.

`use` runs the engine on one's own modules, in a notebook; `minipaged lesson` does the rest.
"""

from __future__ import annotations

from minipaged.course.substitution import use, whose

__all__ = ["use", "whose"]
