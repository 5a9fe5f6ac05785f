"""Equal names mean equal prefixes, also against prompts made to collide."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from llmd import Hasher, Prompt, Request
from llmd.errors import EmptyPrompt, InvalidRequest
from llmd.hashing import seed_of

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=40)
NAMES = st.sampled_from(["", "a", "b"])


@given(
    one=TOKENS,
    other=TOKENS,
    salts=st.tuples(NAMES, NAMES),
    loras=st.tuples(NAMES, NAMES),
)
def test_equal_if_and_only_if_prefix_salt_and_adapter_are(one, other, salts, loras):
    left = Request(id="l", prompt=one, salt=salts[0], lora=loras[0]).hashes(4)
    right = Request(id="r", prompt=other, salt=salts[1], lora=loras[1]).hashes(4)
    for block, (a, b) in enumerate(zip(left.tolist(), right.tolist(), strict=False)):
        end = (block + 1) * 4
        same = (
            one[:end] == other[:end] and salts[0] == salts[1] and loras[0] == loras[1]
        )
        assert (a == b) is same


MEDIA = st.lists(st.tuples(st.integers(0, 39), NAMES.filter(bool)), max_size=3)


@given(tokens=TOKENS, one=MEDIA, other=MEDIA)
def test_equal_if_and_only_if_the_media_before_are(tokens, one, other):
    def of(media):
        inside = tuple(item for item in media if item[0] < len(tokens))
        return Request(id="r", prompt=tokens, media=inside).hashes(4).tolist()

    def before(media, end):
        return sorted(item for item in media if item[0] < end)

    for block, (a, b) in enumerate(zip(of(one), of(other), strict=True)):
        end = (block + 1) * 4
        assert (a == b) is (before(one, end) == before(other, end))


@given(tokens=st.lists(st.integers(0, 200_000), min_size=1, max_size=300))
def test_names_do_not_depend_on_the_size_of_blocks_or_on_the_form(tokens):
    sizes = [1, 2, 4, 16, 64]
    by_length = {}
    for size in sizes:
        for block, name in enumerate(Prompt.of(tokens).hashes(size).tolist()):
            assert by_length.setdefault((block + 1) * size, name) == name
    forms = [
        np.array(tokens, dtype=kind)
        for kind in (np.int32, np.uint32, np.int64, np.uint64)
    ]
    for form in [*forms, tuple(tokens), np.array([0, *tokens])[1:]]:
        assert (
            Prompt.of(form).hashes(4).tolist() == Prompt.of(tokens).hashes(4).tolist()
        )


@given(tokens=st.lists(st.integers(0, 999), min_size=2, max_size=200), data=st.data())
def test_a_longer_prompt_is_named_as_if_it_were_new(tokens, data):
    cut = data.draw(st.integers(1, len(tokens) - 1))
    prompt = Prompt.of(tokens[:cut])
    prompt.hashes(8)
    longer = prompt.extended(tokens[cut:])
    assert longer.hashes(8).tolist() == Prompt.of(tokens).hashes(8).tolist()


def thue_morse(length):
    return [bin(number).count("1") & 1 for number in range(length)]


def structured_prompts(length):
    """Yield distinct prompts of the kinds that break weak hashes."""
    base = list(range(1, length + 1))
    yield base
    yield [0] * length
    yield [1] * length
    for scale in (1, 2, 3, 1 << 8, 1 << 16, 1 << 17):
        morse = thue_morse(length)
        yield [bit * scale for bit in morse]
        yield [(1 - bit) * scale + 7 for bit in morse]
    for power in range(18):
        for place in range(0, length, 7):
            changed = list(base)
            changed[place] += 1 << power
            yield changed
    for one, other in itertools.combinations(range(0, length, 9), 2):
        swapped = list(base)
        swapped[one], swapped[other] = swapped[other], swapped[one]
        yield swapped
        moved = list(base)
        moved[one] += 1
        moved[other] -= 1
        yield moved
    for shift in range(1, 16):
        yield base[shift:] + base[:shift]
        yield [token << 1 for token in base[shift:]] + base[:shift]


@pytest.mark.parametrize("seed", range(4))
def test_no_collision_among_prompts_made_to_collide(seed):
    hasher = Hasher(key=bytes([seed]) * 16)
    length = 128
    names: dict[int, tuple[int, ...]] = {}
    prompts = {tuple(prompt) for prompt in structured_prompts(length)}
    assert len(prompts) > 500
    for prompt in prompts:
        tokens = np.array(prompt, dtype=np.int64).view(np.uint64)
        for block, name in enumerate(hasher.hashes(tokens, 16).tolist()):
            prefix = prompt[: (block + 1) * 16]
            assert names.setdefault(name, prefix) == prefix


def test_a_prefix_of_zeros_is_not_the_same_at_every_length():
    names = Hasher(key=bytes(16)).hashes(np.zeros(64, dtype=np.uint64), 16)
    assert len(set(names.tolist())) == 4


def test_the_low_bits_alone_tell_prompts_apart():
    """A dict looks at the low bits first, so they must spread."""
    hasher = Hasher(key=bytes(16))
    lows = set()
    for number in range(4096):
        tokens = np.full(16, number, dtype=np.uint64)
        lows.add(int(hasher.hashes(tokens, 16)[0]) & 0xFFFF)
    # 4096 balls in 65536 bins leave 3970 +- 11 bins filled.
    assert len(lows) > 3900


@settings(max_examples=30)
@given(key=st.binary(min_size=16, max_size=32))
def test_processes_that_share_a_key_share_names(key):
    tokens = np.arange(100, dtype=np.uint64)
    one, other = Hasher(key), Hasher(key)
    other.hashes(np.arange(70_000, dtype=np.uint64), 16)
    assert one.hashes(tokens, 16).tolist() == other.hashes(tokens, 16).tolist()
    assert seed_of("s", "l", one) == seed_of("s", "l", other)
    assert one.fingerprint == other.fingerprint
    assert key.hex() not in one.fingerprint


@pytest.mark.parametrize("tokens", [[1.5], ["a"], [-1], [[1]], np.array([1.0]), None])
def test_what_is_no_prompt_is_refused(tokens):
    with pytest.raises(InvalidRequest):
        Prompt.of(tokens)


@pytest.mark.parametrize("tokens", [[], b"", np.array([], dtype=np.int64)])
def test_an_empty_prompt_is_refused(tokens):
    with pytest.raises(EmptyPrompt):
        Prompt.of(tokens)


def test_bytes_are_prompts_of_their_bytes():
    assert (
        Prompt.of(b"abcdefgh").hashes(4).tolist()
        == Prompt.of(list(b"abcdefgh")).hashes(4).tolist()
    )


@pytest.mark.parametrize(
    "tokens",
    [
        np.array([1, -1]),
        np.array([-1, 1], np.int32),
        np.array([2**63], np.uint64),
        [2**64 - 1],
    ],
    ids=repr,
)
def test_a_token_below_0_would_add_nothing_and_is_refused(tokens):
    with pytest.raises(InvalidRequest):
        Request(id="r", prompt=tokens)


def test_a_view_of_numbers_is_numbers():
    numbers = memoryview(np.arange(300))
    assert Request(id="r", prompt=numbers).prompt_tokens == 300
    assert (Prompt.of(numbers).hashes(16) == Prompt.of(range(300)).hashes(16)).all()
