"""How others merge: each as loops over its published words, through the cache, and only while it is asked for."""

from __future__ import annotations

from dataclasses import replace
from math import e

import numpy as np
import pytest
import torch

from bench import folding_picture, merging, quality
from bench.forced import forced_logits
from bench.merging import CONTROLS, D2O, MergePlan, cam, matching, merging_press, second_set, tome
from linear_core.plan import CachePlan
from linear_core.policies import POLICIES
from linear_core.policies.random import random
from linear_core.prompts import class_prompt
from tests.policies.test_policies import make, one_hot, random_view
from tests.tiny import llamagen

WINDOW = 5  # of CaM, in place of 32, so that it ends before the picture does
MERGES = {"CaM": lambda: cam, "D2O": D2O, "ToMe": lambda: tome, "MergingPress": lambda: merging_press}


def by_loops(name, keys, values, size, index, mass, chance, victims, kept, before):
    """One head: keys, values S D and sizes S after merging, and D2O's threshold; `before` is the last one."""
    new_keys, new_values, new_size, threshold = keys.copy(), values.copy(), size.copy(), None
    if name == "CaM":
        for v in victims:
            window = sorted((index[s], s) for s in kept if index[s] > index[v])[:WINDOW]
            odds = mass[v] / np.mean([mass[s] for _, s in window]) if window else 0
            for _, s in window if chance[v] < odds else ():
                new_values[s] += values[v] / len(window)
        return new_keys, new_values, new_size, threshold

    def cosine(a, b):
        return keys[a] @ keys[b] / np.linalg.norm(keys[a]) / np.linalg.norm(keys[b])

    target = {v: max(kept, key=lambda s: cosine(v, s)) for v in victims}
    similarity = {v: cosine(v, target[v]) for v in victims}
    if name == "D2O":
        newest = np.mean(list(similarity.values()))
        threshold = newest if before is None else 0.7 * newest + 0.3 * before
    for s in set(target.values()):
        merged = [v for v in victims if target[v] == s]
        if name == "D2O":
            merged = [v for v in merged if similarity[v] >= threshold]
            weights = [e, *(np.exp(similarity[v]) for v in merged)]
        elif name == "ToMe":
            weights = [size[s], *(size[v] for v in merged)]
            new_size[s] = sum(weights)
        else:
            long = np.linalg.norm(values, axis=-1)
            weights = [1, *(max(similarity[v], 0) * long[v] / (long[v] + long[s] + 1e-6) for v in merged)]
        new_values[s] = np.average(values[[s, *merged]], axis=0, weights=weights)
        if name != "MergingPress":
            new_keys[s] = np.average(keys[[s, *merged]], axis=0, weights=weights)
    return new_keys, new_values, new_size, threshold


@pytest.mark.parametrize("name", MERGES)
def test_merging_is_what_its_authors_write(name, monkeypatch):
    """Two lines' ends, so that D2O's threshold has a past; every head has victims of its own."""
    monkeypatch.setattr(merging, "MERGED", WINDOW)
    merge, before, changed = MERGES[name](), {}, 0
    for seed in range(2):
        view = random_view()
        source = torch.Generator().manual_seed(seed)
        view = replace(view, values=view.values.roll(1, -1), bias=view.bias + torch.randint(0, 2, view.bias.shape,
                       generator=source).float())  # fmt: skip
        image = view.candidates()
        victims = torch.rand(image.shape, generator=source).masked_fill(~image, -1).topk(9).indices
        kept = image.scatter(-1, victims, False)
        keys, values, bias = merge(view, victims, kept)
        chance = (random(view) + 0.5) / 2**32
        for place in np.ndindex(*image.shape[:3]):
            told = (x[place].double().numpy() for x in (view.keys, view.values, view.bias.exp(), view.index, view.mass,
                                                        chance))  # fmt: skip
            stay = kept[place].nonzero()[:, 0].tolist()
            *expected, threshold = by_loops(name, *told, victims[place].tolist(), stay, before.get(place))
            for found, known in zip((keys, values, bias.exp()), expected, strict=True):
                np.testing.assert_allclose(found[place].numpy(), known, rtol=1e-4, atol=1e-5)
            changed += not np.allclose(expected[1], view.values[place].numpy())
            before[place] = threshold
    assert changed > 30, "most heads have something to merge"


def test_tome_matches_every_other_token():
    """In the order of the sequence, wherever they lie. Of the first set the best matched goes first: 3 equals 4."""
    keys = one_hot(0, 1, 2, 3, 3, 5, 6, 7, 4) + 0.1 * one_hot(*[2] * 9)
    order = [4, 2, 0, 3, 1, 5, 8, 7, 6]
    view = make(keys[order], cols=4, index=order)
    assert sorted(np.array(order)[second_set(view)[0, 0, 0].numpy()]) == [2, 4, 6, 8], "token 0 is the prompt"
    scores = dict(zip(order, matching(view)[0, 0, 0].tolist(), strict=True))
    assert min(range(1, 9), key=scores.get) == 3
    assert min(scores[n] for n in (2, 4, 6, 8)) > max(scores[n] for n in (1, 3, 5, 7))


def test_a_merge_that_merges_nothing_drops(monkeypatch):
    """Through the hook, the logits of plain eviction; afterwards folding is what it was."""
    model, codes = llamagen(7, 5, dtype=torch.float64), torch.arange(70).view(2, 7, 5) % 11
    prompt = class_prompt([1, 3])

    def logits(plan):
        with merging.merging(plan):
            return forced_logits(model, prompt, codes, plan)

    plain = logits(CachePlan("fold", 2, 2, 1))
    nothing = merging.Control("line", lambda: lambda view, victims, kept: (view.keys, view.values, view.bias))
    monkeypatch.setitem(CONTROLS, "nothing", nothing)
    dropped = logits(MergePlan("line", 2, 2, 1, "fold", merge="nothing"))
    torch.testing.assert_close(dropped, logits(CachePlan("line", 2, 2, 1, "strict")))
    found = [logits(MergePlan(c.policy, 2, 2, 1, "fold", merge=n)) for n, c in CONTROLS.items() if n != "nothing"]
    for one in found:
        assert one.isfinite().all() and not torch.allclose(one, plain)
        assert sum(torch.equal(one, other) for other in found) == 1, "no two are the same"
    assert torch.equal(logits(CachePlan("fold", 2, 2, 1)), plain) and "ToMe" not in POLICIES


def test_a_method_has_two_rows():
    names = [c.name for c in quality.contenders(["D2O", "tova"])]
    assert names == ["tova", "D2O", "fold merged as D2O"]
    assert {c.merge for c in quality.contenders([*POLICIES, *merging.METHODS])} == {"", *CONTROLS}


def test_the_picture_of_folding_is_true():
    """Shares are shares. Evicted, all others take something; folded, one takes all that there is to take."""
    before, evicted, folded, gone = folding_picture.scene()
    for discs in (before, evicted, folded):
        assert sum(disc.own + disc.taken for disc in discs) == pytest.approx(1)
    assert len(evicted) == len(folded) == len(before) - 1 and min(disc.taken for disc in evicted) > 0.01
    assert sorted(disc.taken for disc in folded)[-1] == pytest.approx(before[gone].own, rel=0.02)
    assert sum(disc.taken > 0 for disc in folded) == 1
