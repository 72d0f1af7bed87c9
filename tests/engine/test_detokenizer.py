"""Text comes out as it was decoded whole, whatever the chunks; stop strings cut it, and never show a part of themselves."""

from __future__ import annotations

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_core import demo
from sglang_core.engine.detokenizer import IncrementalDecoder, TextStream
from sglang_core.engine.tokenizer import HFTokenizer
from sglang_core.types import SamplingParams


@cache
def tokenizer() -> HFTokenizer:
    return HFTokenizer(demo.path())


texts = st.text(alphabet=st.sampled_from("ab ,.Paris\n中文é🙂"), max_size=60)


@settings(deadline=None)
@given(texts)
def test_incremental_text_is_the_whole_text(text: str) -> None:
    ids = tokenizer().encode(text)
    decoder = IncrementalDecoder(tokenizer(), skip_special_tokens=True)
    assert "".join(decoder.push(i) for i in ids) + decoder.flush() == tokenizer().decode(ids)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=40))
def test_any_ids_give_the_text_of_all_of_them_but_broken_characters(ids: list[int]) -> None:
    decoder = IncrementalDecoder(tokenizer(), skip_special_tokens=True)
    text = "".join(decoder.push(i) for i in ids) + decoder.flush()
    whole = tokenizer().decode(ids)
    assert text.replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_a_character_of_several_tokens_comes_in_one_piece() -> None:
    ids = tokenizer().encode("🙂")
    assert len(ids) > 1
    decoder = IncrementalDecoder(tokenizer(), skip_special_tokens=True)
    assert [decoder.push(i) for i in ids] == [""] * (len(ids) - 1) + ["🙂"]


@settings(deadline=None)
@given(
    text=texts,
    stops=st.lists(st.text(alphabet="ab ,.Paris", min_size=1, max_size=5), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 7), min_size=1, max_size=20),
    keep=st.booleans(),
)
def test_stop_strings_cut_at_the_first_and_are_never_shown_in_part(
    text: str, stops: list[str], cuts: list[int], keep: bool
) -> None:
    ids = tokenizer().encode(text)
    stream = TextStream(tokenizer(), SamplingParams(stop=tuple(stops), no_stop_trim=keep))
    shown, match, at = "", None, 0
    for cut in cuts * len(ids):
        if at >= len(ids) or match is not None:
            break
        more, match = stream.push(ids[at : at + cut])
        shown, at = shown + more, at + cut
        assert match is not None or not any(stop in shown for stop in stops)
    if match is None:
        rest, match = stream.finish()
        shown += rest
    whole = tokenizer().decode(ids)
    if match is None:
        assert shown == whole
        assert not any(stop in whole for stop in stops)
    else:
        end = whole.index(match.matched, len(shown) - len(match.matched) * keep)
        assert shown == whole[: end + len(match.matched) * keep]
        assert match.num_tokens <= len(ids)
        # Nothing that came a whole token earlier was missed: the text before the completing token has no stop.
        before = tokenizer().decode(ids[: match.num_tokens - 1])
        assert not any(stop in before.rstrip("\ufffd") for stop in stops)


def test_stops_are_not_looked_for_before_min_new_tokens() -> None:
    ids = tokenizer().encode("Paris is in France. Paris")
    stream = TextStream(tokenizer(), SamplingParams(stop=("Paris",), min_new_tokens=3))
    stream.push(ids)
    assert stream.num_tokens >= 3


class Counting:
    """The demo tokenizer, watched."""

    def __init__(self) -> None:
        self.longest = 0

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        self.longest = max(self.longest, len(ids))
        return tokenizer().decode(ids, skip_special_tokens=skip_special_tokens)


def test_tokens_without_text_do_not_make_each_next_one_dearer() -> None:
    special, half_a_character = 0, tokenizer().encode("🙂")[0]
    for token_id in (special, half_a_character):
        counting = Counting()
        decoder = IncrementalDecoder(counting, skip_special_tokens=True)  # type: ignore[arg-type]
        text = decoder.push(tokenizer().encode("Paris")[0])
        text += "".join(decoder.push(token_id) for _ in range(300))
        text += "".join(decoder.push(i) for i in tokenizer().encode(" and🙂")) + decoder.flush()
        assert counting.longest < 50
        assert text.replace("\ufffd", "") == tokenizer().decode(tokenizer().encode("Paris")[:1]) + " and🙂"
