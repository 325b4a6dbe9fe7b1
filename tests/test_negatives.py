"""Wrong captions are wrong, plausible, and count as negatives exactly where they may."""

import itertools

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from conditioning.contrastive import contrastive_loss
from conditioning.negatives import WrongCaptions
from train.data.shapes import all_scenes, parse_caption

CAPTIONS = [scene.caption for scene in itertools.islice(all_scenes(2, False), 0, None, 7)]
WRONG = WrongCaptions(CAPTIONS)


def test_every_kind_of_word_is_changed_and_the_relation_too() -> None:
    caption = "a small red circle above a large purple square on a black background"
    changes = {WRONG.choose(caption, u / 500) for u in range(500)}
    assert caption not in changes
    assert {
        "a small red circle below a large purple square on a black background",  # relation
        "a small purple circle above a large red square on a black background",  # exchanged colours
        "a large red circle above a small purple square on a black background",  # exchanged sizes
        "a small red star above a large purple square on a black background",  # another shape
    } <= changes


def test_nearly_all_changes_are_captions_that_could_be() -> None:
    made = [WRONG.choose(c, u) for c in CAPTIONS[:200] for u in (0.1, 0.5, 0.9)]
    readable = 0
    for caption in made:
        assert caption is not None
        try:
            parse_caption(caption)
            readable += 1
        except ValueError:
            pass
    assert readable > 0.8 * len(made)


def test_words_nobody_could_confuse_have_no_change() -> None:
    assert WrongCaptions(["one two three"]).choose("one two three", 0.5) is None
    assert WrongCaptions([""]).choose("", 0.5) is None


@given(st.lists(st.text(max_size=20), max_size=5), st.text(max_size=20), st.floats(0, 1, exclude_max=True))
def test_any_text_is_accepted_and_never_given_back(captions: list[str], caption: str, u: float) -> None:
    changed = WrongCaptions([*captions, caption]).choose(caption, u)
    assert changed is None or changed.split() != caption.split()


def test_wrong_captions_enter_the_pictures_softmax_and_nothing_else() -> None:
    g = torch.Generator().manual_seed(0)
    image, text, wrong = (torch.randn(4, 8, generator=g, dtype=torch.float64) for _ in range(3))
    ids = torch.arange(4)
    scale = torch.tensor(1.3, dtype=torch.float64)
    got = contrastive_loss(image, text, scale, ids, wrong_features=wrong, wrong_ids=torch.arange(4) + 100)
    i, t, w = (F.normalize(x, dim=-1) for x in (image, text, wrong))
    s = scale.exp()
    to_text = F.cross_entropy(s * i @ torch.cat([t, w]).T, ids)
    to_image = F.cross_entropy(s * t @ i.T, ids)
    torch.testing.assert_close(got, (to_text + to_image) / 2)


def test_a_wrong_caption_that_is_right_for_a_neighbour_or_missing_is_left_out() -> None:
    g = torch.Generator().manual_seed(0)
    image, text, wrong = (torch.randn(4, 8, generator=g) for _ in range(3))
    ids, scale = torch.tensor([0, 1, 1, 2]), torch.tensor(1.0)
    plain = contrastive_loss(image, text, scale, ids)
    none = contrastive_loss(image, text, scale, ids, wrong_features=wrong, wrong_ids=torch.full((4,), -1))
    torch.testing.assert_close(none, plain)
    wrong.requires_grad_()
    # Caption 0's wrong version is what pictures 1 and 2 show: it may push picture 0 and 3 only.
    image.requires_grad_()
    contrastive_loss(image, text, scale, ids, wrong_features=wrong, wrong_ids=torch.tensor([1, -1, -1, -1])).backward()
    assert wrong.grad is not None
    assert wrong.grad[0].abs().sum() > 0
    assert wrong.grad[1:].abs().sum() == 0
    first = image.grad.clone()
    image.grad = None
    contrastive_loss(image, text, scale, ids).backward()
    moved = (first - image.grad).abs().sum(1) > 1e-6
    assert moved.tolist() == [True, False, False, True]
