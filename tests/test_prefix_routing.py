"""The choice among replicas by prefix, against the plain rule over all prompts ever sent."""

from hypothesis import given
from hypothesis import strategies as st

from minipaged.serving.prefix_routing import PrefixRouter

prompts = st.lists(st.integers(0, 1), max_size=10)
replicas = st.sampled_from("ABC")
salts = st.sampled_from([b"", b"x"])
sent = st.lists(st.tuples(prompts, replicas, salts), max_size=12)


def common_blocks(prompt, others, block_size):
    """Full blocks with which the prompt and any of the others begin."""
    longest = 0
    for other in others:
        blocks = min(len(prompt), len(other)) // block_size
        while prompt[: blocks * block_size] != other[: blocks * block_size]:
            blocks -= 1
        longest = max(longest, blocks)
    return longest


def router_after(history, block_size, slack=2):
    router = PrefixRouter(block_size, slack)
    for prompt, replica, salt in history:
        router.remember(prompt, replica, salt)
    return router


@given(history=sent, prompt=prompts, salt=salts, block_size=st.integers(1, 3))
def test_a_replica_knows_the_prefixes_of_what_it_was_sent(history, prompt, salt, block_size):
    router = router_after(history, block_size)
    expected = {
        replica: common_blocks(
            prompt, [p for p, r, s in history if (r, s) == (replica, salt)], block_size
        )
        for replica in "ABC"
    }
    assert router.num_known(prompt, "ABC", salt) == expected, f"{prompt} after {history}"


@given(
    history=sent,
    prompt=prompts,
    loads=st.dictionaries(replicas, st.integers(0, 8), min_size=1),
    slack=st.integers(0, 5),
)
def test_the_longest_prefix_wins_where_nobody_is_much_busier(history, prompt, loads, slack):
    router = router_after(history, 2, slack)
    ranked = router.rank(prompt, loads)
    assert sorted(ranked) == sorted(loads), "every replica has a place"
    best, known = ranked[0], router.num_known(prompt, loads)
    bound = min(loads.values()) + slack
    assert loads[best] <= bound, f"{best} has {loads[best]} requests, the bound is {bound}"
    for other in loads:
        if loads[other] <= bound:
            assert known[other] <= known[best], f"{other} has more of {prompt} than {best}"
            if known[other] == known[best]:
                assert loads[best] <= loads[other], f"{other} is less busy than {best}"


@given(st.lists(st.integers(2, 99), min_size=6, max_size=30, unique=True))
def test_prompts_that_have_nothing_in_common_are_spread_evenly(firsts):
    router = PrefixRouter(1)
    counts = dict.fromkeys("ABC", 0)
    for first in firsts:
        best, *_ = router.rank([first], dict.fromkeys("ABC", 0))
        router.remember([first], best)
        counts[best] += 1
    assert max(counts.values()) - min(counts.values()) <= 1, counts


def test_the_least_recently_used_prefix_is_forgotten_from_its_end():
    router = PrefixRouter(1, capacity=4)
    router.remember([1, 2, 3], "A")
    router.remember([5, 6], "B")
    assert router.num_known([1, 2, 3], "AB") == {"A": 2, "B": 0}
    assert router.num_known([5, 6], "AB") == {"A": 0, "B": 2}
