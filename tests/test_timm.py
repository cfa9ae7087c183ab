"""timm's models through transformers' TimmWrapper; skipped where timm, which needs torchvision, is not installed."""

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification, TimmWrapperConfig

from hf_layercollapse import LayerCollapseConfig, apply_layer_collapse, collapse_model, find_feed_forward_blocks
from hf_layercollapse.patching import alpha_parameters, penalty


pytest.importorskip("timm", reason="timm is not installed; its torchvision has no build for every CPU build of torch")

SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
# Architecture -> its arguments, and its blocks; a mixer's maps over tokens are such too, and its sizes are fixed.
CASES = {
    "vit_tiny_patch16_224": (SMALL, 2),
    "deit_tiny_distilled_patch16_224": (SMALL, 2),
    "mixer_s32_224": ({"img_size": 64}, 16),
}


@pytest.mark.parametrize("architecture", CASES)
def test_timm_through_its_wrapper(architecture, tmp_path):
    arguments, count = CASES[architecture]
    config = TimmWrapperConfig(architecture=architecture, model_args=arguments, num_labels=3)
    model = AutoModelForImageClassification.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    images = {"pixel_values": torch.randn(4, 3, 64, 64)}
    blocks = find_feed_forward_blocks(model)
    assert len(blocks) == count
    with torch.no_grad():
        dense = model(**images).logits
        apply_layer_collapse(model, LayerCollapseConfig())
        assert torch.equal(model(**images).logits, dense)

    alphas = alpha_parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(3):
        loss = model(**images, labels=torch.arange(4) % 3).loss + penalty(alphas)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(0 < float(alpha.detach()) < 1 for alpha in alphas)
    model.save_pretrained(tmp_path / "patched")
    patched = AutoModelForImageClassification.from_pretrained(tmp_path / "patched").eval()
    with torch.no_grad():
        assert torch.equal(patched(**images).logits, model(**images).logits)
        for alpha in alphas:
            alpha.fill_(1.0)
        linear = model(**images).logits
        report = collapse_model(model)
        assert report.collapsed == [block.name for block in blocks]
        torch.testing.assert_close(model(**images).logits, linear, rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path / "collapsed")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "collapsed").eval()
    base = AutoModel.from_pretrained(tmp_path / "collapsed").eval()
    with torch.no_grad():
        assert torch.equal(again(**images).logits, model(**images).logits)
    assert {block.state for block in find_feed_forward_blocks(base)} == {"collapsed"}
