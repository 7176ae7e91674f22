"""Facts about the tiny world's text encoder."""
import pytest
import torch

from worlds.tiny import TinyText
from worlds.tiny_base import NOT_A_FIGURE, Config, roles, roles_loss, teach_text
from worlds.tiny_prompts import LENGTH, PROMPTS, VOCAB


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    text = TinyText(VOCAB, LENGTH, 8)
    for p in text.blocks.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return text.requires_grad_(False)


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


def test_new_layers_change_nothing_and_trained_ones_read_the_context():
    torch.manual_seed(0)
    text = TinyText(VOCAB, LENGTH, 8)
    prompts = ["a circle left of a square", "a circle right of a square"]
    tokens = text.tokens(prompts)
    assert torch.equal(text(prompts)[0], text.words(tokens))
    for p in text.blocks.parameters():
        torch.nn.init.normal_(p, std=0.1)
    left, right = text(prompts)[0]
    assert (left[1] - right[1]).abs().max() > 1e-3       # "circle" differs by a later word


def test_roles_say_the_side_the_colour_and_the_count_of_each_figure():
    def asked(tag, prompt):
        meta, = [meta for meta in PROMPTS["photo", tag, "train"] if meta["prompt"] == prompt]
        words = prompt.split()
        table = roles(meta, words).tolist()
        return {word: row for word, row in zip(words, table) if row != [NOT_A_FIGURE] * 3}

    assert asked("position", "a photo of a circle left of a square") == {
        "circle": [1, 0, 1], "square": [2, 0, 1]}
    assert asked("position", "a photo of a circle below a square") == {
        "circle": [4, 0, 1], "square": [3, 0, 1]}
    assert asked("color_attr", "a photo of a blue square and a yellow circle") == {
        "square": [0, 3, 1], "circle": [0, 4, 1]}
    assert asked("counting", "a photo of four circles") == {"circles": [0, 0, 4]}
    assert not (roles({"word": "HAT"}, ["HAT"]) != NOT_A_FIGURE).any()


def test_taught_text_encoder_reads_relations_of_pairs_that_it_was_not_taught():
    torch.manual_seed(0)
    text = TinyText(VOCAB, LENGTH, 32)
    metas = PROMPTS["photo", "position", "eval"]
    cfg = Config(text_steps=200, batch=64, lr=4e-3)
    head = teach_text(text, cfg, 0, 1)
    with torch.no_grad():
        assert roles_loss(text, head, metas)[1] > 0.6    # chance of a side alone: 1 in 4


def test_pooled_text_is_the_mean_over_used_tokens_and_rows_do_not_mix(text):
    prompts = ["a red circle", "", 'a sign that says "HAT"']
    context, pooled = text(prompts)
    torch.testing.assert_close(pooled[0], text.pool(context[0, :3].mean(0)))
    torch.testing.assert_close(pooled[1], text.pool.bias)
    for i, prompt in enumerate(prompts):
        alone_context, alone_pooled = text([prompt])
        torch.testing.assert_close(alone_context[0], context[i])
        torch.testing.assert_close(alone_pooled[0], pooled[i])
