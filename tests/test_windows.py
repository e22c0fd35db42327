"""Windowed attention and relative positions: against loops over queries, timm's own forward pass, and ViTDet's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from loco_det.backbones.timm_models import TimmBackbone, parse
from loco_det.backbones.windows import relative
from loco_det.core.errors import UserError

DEPTH = 6  # of timm's test_vit; 64 channels, two heads, patches of 16 pixels


def backbone(seed: int = 0, **options: object) -> TimmBackbone:
    """test_vit, float64, every parameter random."""
    torch.manual_seed(seed)
    built = TimmBackbone("test_vit", maps=[f"blocks.{DEPTH - 1}"], positions="size", **options).double().eval()
    for parameter in built.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    return built


def attended(attention: nn.Module, x: np.ndarray, side: int) -> np.ndarray:
    """Query by query: the keys of its window, zeros beyond the map, with the distances' vectors if there are any."""
    (height, width, channels), heads = x.shape, attention.num_heads
    weight, bias = (t.detach().numpy() for t in (attention.qkv.weight, attention.qkv.bias))
    depth = channels // heads
    tables = [
        t.detach().numpy()
        for t in (getattr(attention, "rel_pos_h", None), getattr(attention, "rel_pos_w", None))
        if t is not None
    ]
    out = np.zeros_like(x)
    for i in range(height):
        for j in range(width):
            top, left = (i // side * side, j // side * side) if side else (0, 0)
            rows, columns = (
                (range(top, top + side), range(left, left + side)) if side else (range(height), range(width))
            )
            places = [(a, b) for a in rows for b in columns]
            zero = np.zeros(channels)
            keys = np.stack([x[a, b] if a < height and b < width else zero for a, b in places])
            q = (weight[:channels] @ x[i, j] + bias[:channels]).reshape(heads, depth)
            k = (keys @ weight[channels : 2 * channels].T + bias[channels : 2 * channels]).reshape(-1, heads, depth)
            v = (keys @ weight[2 * channels :].T + bias[2 * channels :]).reshape(-1, heads, depth)
            for head in range(heads):
                logits = np.array([q[head] @ k[n, head] / math.sqrt(depth) for n in range(len(places))])
                for n, (a, b) in enumerate(places if tables else ()):
                    for table, distance in ((tables[0], i - a), (tables[1], j - b)):
                        logits[n] += q[head] @ table[distance + (len(table) - 1) // 2]
                share = np.exp(logits - logits.max())
                mixed = (share / share.sum()) @ v[:, head]
                out[i, j, head * depth : (head + 1) * depth] = mixed
    return out @ attention.proj.weight.detach().numpy().T + attention.proj.bias.detach().numpy()


def by_hand(model: nn.Module, patches: Tensor, side: int, global_blocks: tuple[int, ...]) -> np.ndarray:
    """The blocks of a transformer on one map (h, w, C)."""
    x = patches.detach().numpy()

    def normed(norm: nn.LayerNorm, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps)
        return scaled * norm.weight.detach().numpy() + norm.bias.detach().numpy()

    def linear(layer: nn.Linear, x: np.ndarray) -> np.ndarray:
        return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()

    erf = np.vectorize(math.erf)
    for index, block in enumerate(model.blocks):
        x = x + attended(block.attn, normed(block.norm1, x), 0 if index in global_blocks else side)
        hidden = linear(block.mlp.fc1, normed(block.norm2, x))
        x = x + linear(block.mlp.fc2, hidden * (1 + erf(hidden / math.sqrt(2))) / 2)
    return x


@pytest.mark.parametrize("options", [{}, {"rel_pos": 5}])
def test_every_query_attends_to_its_window(options: dict[str, int]) -> None:
    """A map of 5 x 5 patches in windows of 3, so that the last ones are completed with zeros."""
    net = backbone(window=3, global_blocks=(1, 5), **options)
    image = torch.randn(1, 3, 80, 80, dtype=torch.float64)
    with torch.no_grad():
        patches = net.model.patch_embed(image)[0]
        table = net.model.pos_embed[:, 1:].reshape(1, 10, 10, 64).permute(0, 3, 1, 2)
        patches = patches + nn.functional.interpolate(table, size=(5, 5), mode="bicubic")[0].permute(1, 2, 0)
        found = net(image)["blocks.5"][0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, by_hand(net.model, patches, 3, (1, 5)), rtol=1e-6, atol=1e-6)


def test_a_patch_is_seen_in_its_window_alone() -> None:
    net = backbone(window=2, global_blocks=())
    image = torch.randn(1, 3, 80, 112, dtype=torch.float64)
    other = image.clone()
    other[:, :, 16 * 3 : 16 * 4, 16 * 4 : 16 * 5] += 1  # the patch in row 3, column 4
    with torch.no_grad():
        changed = (net(image)["blocks.5"] - net(other)["blocks.5"]).abs().sum(1)[0] > 1e-9
    expected = torch.zeros(5, 7, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(changed, expected)
    seen = backbone(window=2, global_blocks=3)
    with torch.no_grad():
        assert ((seen(image)["blocks.5"] - seen(other)["blocks.5"]).abs().sum(1) > 1e-9).all()


@pytest.mark.parametrize("parts", [{}, {"init_values": 0.5, "pre_norm": True, "qk_norm": True}])
def test_global_blocks_alone_are_timms_model_without_its_token(parts: dict[str, object]) -> None:
    """With LayerScale and further norms, too."""
    net = backbone(window=9, global_blocks=tuple(range(DEPTH)), **parts)
    theirs = timm.create_model("test_vit", class_token=False, global_pool="avg", num_classes=0, **parts).double().eval()
    state = net.model.state_dict() | {"pos_embed": net.model.pos_embed[:, 1:]}
    left = theirs.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert all("norm" in name for name in left.missing_keys)  # behind the last block
    image = torch.randn(2, 3, 160, 160, dtype=torch.float64)
    with torch.no_grad():
        (expected,) = theirs.forward_intermediates(image, indices=[DEPTH - 1], intermediates_only=True)
        assert torch.allclose(net(image)["blocks.5"], expected, rtol=1e-9, atol=1e-9)
        one_window = backbone(window=10, global_blocks=(), **parts)(image)["blocks.5"]  # as large as the map
        assert torch.allclose(one_window, expected, rtol=1e-9, atol=1e-9)


def test_a_dropped_path_leaves_the_map_as_it_is() -> None:
    """At a rate of 1 in all blocks but the first, whose rate is 0."""
    net = backbone(window=3, drop_path_rate=0.5)
    first = TimmBackbone("test_vit", maps=["blocks.0"], positions="size", window=3).double().eval()
    first.load_state_dict(net.state_dict(), strict=False)
    for block in net.model.blocks[1:]:
        block.drop_path1.drop_prob = block.drop_path2.drop_prob = 1.0
    image = torch.randn(2, 3, 80, 112, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(net.train()(image)["blocks.5"], first(image)["blocks.0"])
        assert not torch.allclose(net.eval()(image)["blocks.5"], first(image)["blocks.0"])


@pytest.mark.parametrize("how", ["timm", "size", "offset"])
def test_positions_are_resized_as_without_windows(how: str) -> None:
    """With all blocks taken out, what is left is patches and positions."""
    torch.manual_seed(0)
    maps = []
    for options in ({}, {"window": 3}):
        torch.manual_seed(1)
        net = TimmBackbone("test_vit", maps=["blocks.0"], positions=how, **options).eval()
        block = net.model.blocks[0]
        for layer in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        torch.manual_seed(2)
        nn.init.normal_(net.model.pos_embed)
        nn.init.normal_(net.model.patch_embed.proj.weight, std=0.02)
        with torch.no_grad():
            maps.append(net(torch.ones(1, 3, 96, 160))["blocks.0"])
    assert torch.allclose(*maps, atol=1e-6)


def test_relative_positions_start_as_none_and_learn() -> None:
    torch.manual_seed(0)
    net = TimmBackbone("test_vit", maps=["norm"], window=3, rel_pos=10).train()
    plain = TimmBackbone("test_vit", maps=["norm"], window=3).train()
    plain.load_state_dict(net.state_dict(), strict=False)
    image = torch.randn(1, 3, 96, 64)
    found = net(image)["norm"]
    assert torch.allclose(found, plain(image)["norm"], atol=1e-5)
    found.square().mean().backward()
    for index, block in enumerate(net.model.blocks):
        assert len(block.attn.rel_pos_h) == (19 if index in (1, 3, 4, 5) else 5)  # the last of each quarter are global
        assert block.attn.rel_pos_h.grad.abs().sum() > 0
        assert block.attn.rel_pos_w.grad.abs().sum() > 0
    net.freeze(2)
    held = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
    assert {"model.blocks.0.attn.rel_pos_h", "model.blocks.1.attn.rel_pos_w"} <= set(held)


@pytest.mark.parametrize(("rows", "length"), [(27, 14), (27, 20), (9, 3), (3, 2)])
def test_a_table_for_another_length_is_resized_linearly(rows: int, length: int) -> None:
    table = torch.randn(rows, 4, dtype=torch.float64)
    found = relative(table, length)
    assert found.shape == (length, length, 4)
    count = 2 * length - 1
    at = (np.arange(count) + 0.5) * rows / count - 0.5  # centres of the new rows among the old
    for query in range(length):
        for key in range(length):
            place = at[query - key + length - 1]
            expected = [np.interp(place, np.arange(rows), table[:, c].numpy()) for c in range(4)]
            np.testing.assert_allclose(found[query, key], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("convnext_atto?window=7", "is no plain VisionTransformer, which windows need"),
        ("eva02_tiny_patch14_224?window=7", "is no plain VisionTransformer"),
        ("test_vit?window=7&scale_attn_norm=True", "is no plain VisionTransformer"),
        ("test_vit?window=7&rel_pos=0.5", "numbers of patches"),
        ("test_vit?rel_pos=14", "window and rel_pos are numbers of patches, e.g. window=14&rel_pos=64"),
        ("test_vit?window=-1", "numbers of patches"),
        ("test_vit?window=two", "numbers of patches"),
        ("test_vit?window=7&global_blocks=3,6", "indices from 0 to 5"),
    ],
)
def test_windows_that_cannot_be_are_one_sentence(name: str, said: str) -> None:
    model, options = parse(f"timm:{name}")
    with pytest.raises(UserError, match=said):
        TimmBackbone(model, **options)


def test_a_name_carries_its_windows() -> None:
    net = TimmBackbone("test_vit", window=3, global_blocks=(2, 5), rel_pos=14)
    assert parse(net.architecture) == ("test_vit", {"window": 3, "global_blocks": (2, 5), "rel_pos": 14})
    assert not any("token" in name for name, _ in net.named_parameters())
    again = TimmBackbone("test_vit", **parse(net.architecture)[1])
    assert again.windows == net.windows
    assert parse("timm:test_vit?global_blocks=2,5&window=3")[1] == {"global_blocks": (2, 5), "window": 3}


@pytest.mark.detectron2
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("use_rel_pos", [False, True])
@pytest.mark.parametrize("size", [(160, 160), (112, 176)])
def test_maps_are_those_of_detectron2s_vit(use_rel_pos: bool, size: tuple[int, int]) -> None:
    """The same tensors under the same names; only the cls token's are missing there, too."""
    vit = pytest.importorskip("detectron2.modeling.backbone.vit")
    from functools import partial

    windowed = [0, 1, 3]
    theirs = vit.ViT(
        img_size=160, patch_size=16, embed_dim=64, depth=DEPTH, num_heads=2, mlp_ratio=3,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), window_size=4, window_block_indexes=windowed,
        use_rel_pos=use_rel_pos, pretrain_img_size=160,
    ).eval()  # fmt: skip
    options = {"rel_pos": 10} if use_rel_pos else {}
    net = TimmBackbone("test_vit", maps=["blocks.5"], positions="size", window=4, global_blocks=(2, 4, 5), **options)
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    net.model.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        found, expected = net.eval()(image)["blocks.5"], theirs(image)["last_feat"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
