import pytest
import torch
from models import small_model

from fastm3ae.config import OptimConfig
from fastm3ae.errors import UserError
from fastm3ae.training.optim import OfficialAdamW, build_optimizer, build_schedule, parameter_groups
from fastm3ae.weights.convert import official_names

# The original's lists, by which it sorts parameters of its own names.
NO_DECAY = ("bias", "LayerNorm.bias", "LayerNorm.weight", "norm.bias", "norm.weight", "norm1.bias", "norm1.weight",
            "norm2.bias", "norm2.weight")  # fmt: skip
HEADS = ("mlm_head", "mim_head", "itm_head", "vqa_head", "cls_head", "irtr_head")


@pytest.mark.parametrize(
    ("vision", "text", "objectives"),
    [
        ("clip", "roberta", ("mlm", "mim", "itm")),
        ("swin", "bert", ("mlm", "itm")),
        ("clip", "bert", ("vqa", "classification")),
        ("swin", "roberta", ("retrieval",)),
    ],
)
def test_groups_equal_the_originals_rule_on_the_official_names(vision, text, objectives):
    model = small_model(vision, text, objectives)
    config = OptimConfig(learning_rate=1e-3, head_lr_multiplier=7, fusion_lr_multiplier=3, weight_decay=0.05)
    seen = []
    for group in parameter_groups(model, config):
        for name in group["names"]:
            seen.append(name)
            for official in official_names(name, vision):
                decay = 0.0 if any(part in official for part in NO_DECAY) else 0.05
                multiplier = 7 if any(h in official for h in HEADS) else 3 if "multi_modal" in official else 1
                assert (group["weight_decay"], group["lr"]) == (decay, 1e-3 * multiplier), official
    assert sorted(seen) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_schedule_with_a_fraction_and_with_steps():
    for config in (OptimConfig(warmup_frac=0.2), OptimConfig(warmup_steps=4)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = build_schedule(optimizer, config, 20)
        rates = []
        for _ in range(21):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
        assert rates[12] == pytest.approx(0.5) and rates[20] == 0


def test_no_warmup_and_an_end_rate():
    config = OptimConfig(learning_rate=1.0, warmup_frac=0.0, end_learning_rate=0.1, decay_power=2.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, config, 10)
    assert schedule.get_last_lr() == [1.0]
    for _ in range(15):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.1])


def test_an_end_rate_above_the_rate_is_refused():
    with pytest.raises(UserError, match="optim.end_learning_rate"):
        OptimConfig(learning_rate=1e-5, end_learning_rate=1e-4)


def test_official_and_torch_adamw_agree_where_gradients_are_large():
    start = torch.randn(50)
    ends = []
    for kind in ("official", "torch"):
        parameter = torch.nn.Parameter(start.clone())
        config = OptimConfig(learning_rate=1e-3, adamw=kind)
        optimizer = build_optimizer([{"params": [parameter], "lr": 1e-3, "weight_decay": 0.01}], config)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            parameter.grad = torch.randn(50, generator=generator) + 3
            optimizer.step()
        ends.append(parameter.detach())
    assert torch.allclose(*ends, atol=1e-6)
    assert not torch.equal(*ends)


def test_official_adamw_leaves_parameters_without_gradient_alone():
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = OfficialAdamW([used, unused], lr=0.1, weight_decay=0.5)
    used.grad = torch.ones(3)
    assert optimizer.step(lambda: 7.0) == 7.0
    assert torch.equal(unused, torch.ones(3)) and not torch.equal(used, torch.ones(3))
