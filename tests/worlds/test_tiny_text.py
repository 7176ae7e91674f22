"""Facts about the tiny world's text encoder."""
import pytest
import torch

from worlds.tiny import TinyText
from worlds.tiny_prompts import LENGTH, VOCAB


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    return TinyText(VOCAB, LENGTH, 8).requires_grad_(False)


@pytest.mark.parametrize("prompt, word", [
    ("a photo of a dog", "dog"), ('a sign that says "HATS OFF!"', "F"), ("a red circle!", "!"),
    ("a café", "caf"), ("two 2", "2")])
def test_unknown_word_is_named(text, prompt, word):
    message = rf"the tiny world has no word '{word}'; it knows a an photo"
    for ask in (text, text.prepare):
        with pytest.raises(ValueError, match=message):
            ask([prompt])


def test_prompt_that_is_too_long_is_refused(text):
    assert text(["a " * LENGTH])[0].shape == (1, LENGTH, 8)
    with pytest.raises(ValueError, match="has 13 tokens, the tiny text encoder takes 12"):
        text(["a " * (LENGTH + 1)])


def test_tokens_are_words_and_capital_letters(text):
    tokens = text.tokens(['a sign that says "HAT"', "a red circle", ""]).tolist()
    words = [[VOCAB[i] for i in row if i] for row in tokens]
    assert words == [["a", "sign", "that", "says", '"', "H", "A", "T", '"'],
                     ["a", "red", "circle"], []]
    for row in tokens:
        assert len(row) == LENGTH
        assert not any(row[row.index(0):])       # padding only at the end


def test_pooled_text_is_the_mean_over_used_tokens_and_rows_do_not_mix(text):
    prompts = ["a red circle", "", 'a sign that says "HAT"']
    context, pooled = text(prompts)
    torch.testing.assert_close(pooled[0], text.pool(context[0, :3].mean(0)))
    torch.testing.assert_close(pooled[1], text.pool.bias)
    for i, prompt in enumerate(prompts):
        alone_context, alone_pooled = text([prompt])
        torch.testing.assert_close(alone_context[0], context[i])
        torch.testing.assert_close(alone_pooled[0], pooled[i])
