"""`bench parallel` counts what two real ranks say to each other."""

import pytest
from command import FORKS_RANKS

from minipaged.cli.bench_parallel import _numbers
from minipaged.distributed import processes
from minipaged.engine.builder import EngineOptions
from minipaged.errors import ConfigurationError
from minipaged.evaluation.parallel import measure_parallel
from minipaged.evaluation.workload import uniform_workload


def test_what_was_counted_is_what_the_formula_says(monkeypatch):
    monkeypatch.setattr(processes, "subprocess", FORKS_RANKS)
    workload = uniform_workload(3, 4, 12, 1024, seed=0)
    options = EngineOptions(dtype="float32", num_blocks=20)
    alone, two = measure_parallel("tiny", workload, options, [1, 2])
    assert (alone.ranks, two.ranks) == (1, 2)
    assert alone.steps == two.steps
    assert alone.counted == alone.formula
    assert alone.on_the_wire == 0
    assert two.counted == two.formula
    tokens = sum(len(r.prompt_token_ids) + r.output_length - 1 for r in workload)
    assert two.counted.all_reduce == (2 * 5 + 1) * tokens * 256 * 4
    if two.loopback is not None:
        assert two.loopback > two.on_the_wire  # headers come on top


@pytest.mark.parametrize(
    ("text", "message"), [("1,x", "--ranks is '1,x'; give numbers"), ("0", "--ranks is 0")]
)
def test_numbers_of_ranks(text, message):
    assert _numbers("1,2") == [1, 2]
    with pytest.raises(ConfigurationError, match=message):
        _numbers(text)
