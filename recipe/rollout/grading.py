"""Samples meet the grader."""

from recipe.rewards.grader import Grader, GradeRequest
from recipe.rollout.sample import SampleGroup


async def grade_group(grader: Grader, group: SampleGroup) -> None:
    """Grades every sample of a complete group."""
    requests = [
        GradeRequest(group.prompt.text, sample.response, group.prompt.label, sample.truncated)
        for sample in group.samples
    ]
    for sample, grade in zip(group.samples, await grader.grade_async(requests), strict=True):
        sample.grade = grade
