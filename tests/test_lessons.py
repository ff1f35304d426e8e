"""T10: every stub fails naming its own task, every planted bug is caught, the reference passes."""

import re

import pytest

from minipaged.course.lesson import all_lessons
from minipaged.course.proof import all_checks

CHECKS = [
    pytest.param(check, id=f"{lesson.number:02d}: {what}")
    for lesson in all_lessons()
    for what, check in all_checks(lesson)
    if what != "the reference passes"  # the tests in lessons/ run on it anyway
]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("check", CHECKS)
def test_a_lesson_is_sound(check):
    check()


@pytest.mark.parametrize("lesson", all_lessons(), ids=lambda lesson: lesson.folder.name)
def test_a_lesson_names_the_sections_that_it_is_listed_under(lesson):
    text = (lesson.folder / "lesson.md").read_text("utf-8")
    said = re.search(r"The paper: sections? ((?:[\d.]*\d|,| |and)+)", text)[1]
    assert re.findall(r"\d(?:\.\d)?", said) == re.findall(r"\d(?:\.\d)?", lesson.sections)


def test_the_lessons_are_all_there():
    lessons = all_lessons()
    assert [lesson.number for lesson in lessons] == list(range(19))
    for lesson in lessons:
        assert 30 <= lesson.minutes <= 90, lesson.name
        assert lesson.points == (100 if lesson.tasks else 0), lesson.name
        assert all(number < lesson.number for number in lesson.requires), lesson.name
    turned = [lesson for lesson in lessons if any(task.by_case for task in lesson.tasks)]
    assert len(turned) >= 4, "in at least four lessons the learner writes the property"
