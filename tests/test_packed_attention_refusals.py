import pytest
import torch
from test_packed_attention import CASES, attend

from fastm3ae.kernels import packed_attention

INPUTS = CASES["odd"].inputs()
Q, K, V, *MEMORY, Q_OFFSETS, K_OFFSETS, LENS, _ = INPUTS
SEED = torch.tensor(0)


def offsets(*places):
    return torch.tensor(places, dtype=torch.int32)


MISTAKES = {
    "flat_q": ({"q_QHd": Q[0]}, r"q must be \(Q, H, d\) .* got \(3, 32\) float32"),
    "no_width": ({"q_QHd": Q[..., :0]}, r"q must be .* d > 0, got \(9, 3, 0\) float32"),
    "integer_q": ({"q_QHd": Q.int()}, "q must be .* floating-point dtype.* got .* int32"),
    "flat_k": ({"k_SHd": K[0]}, r"k must be \(S, 3, 32\) .* got \(3, 32\)"),
    "other_heads": ({"k_SHd": K[:, :2]}, r"k must be \(S, 3, 32\) .* got \(18, 2, 32\)"),
    "other_width_of_v": ({"v_SHd": V[..., :16]}, r"v must be \(S, 3, 32\) .* got \(18, 3, 16\)"),
    "fewer_values": ({"v_SHd": V[1:]}, r"v must be .* as many as k, got \(17, 3, 32\)"),
    "other_dtype_of_k": ({"k_SHd": K.half()}, "k must be .* in q's dtype.* got .* float16"),
    "other_dtype_of_v": ({"v_SHd": V.half()}, "v must be .* in q's dtype.* got .* float16"),
    "int64_q_offsets": ({"q_offsets": Q_OFFSETS.long()}, r"q_offsets must be \(num_sequences \+ 1,\) int32.* int64"),
    "int64_k_offsets": ({"k_offsets": K_OFFSETS.long()}, r"k_offsets must be \(num_sequences \+ 1,\) int32.* int64"),
    "square_offsets": ({"q_offsets": Q_OFFSETS[None]}, r"q_offsets must be .* got \(1, 4\)"),
    "no_offsets": ({"q_offsets": offsets(), "k_offsets": offsets()}, r"q_offsets must be .* got \(0,\)"),
    "fewer_k_offsets": ({"k_offsets": offsets(0, 18)}, r"k_offsets must be .* as many as q's, got \(2,\)"),
    "q_offsets_from_1": ({"q_offsets": offsets(1, 3, 8, 9)}, r"q_offsets must rise from 0 to .* 9, .* got \[1, 3"),
    "q_offsets_too_short": ({"q_offsets": offsets(0, 3, 8, 8)}, r"q_offsets must rise from 0 to .* 9, .* 8, 8\]"),
    "falling_q_offsets": ({"q_offsets": offsets(0, 5, 4, 9)}, r"q_offsets must rise .* got \[0, 5, 4, 9\]"),
    "k_offsets_too_long": ({"k_offsets": offsets(0, 7, 9, 19)}, r"k_offsets must rise from 0 to .* 18, "),
    "falling_k_offsets": ({"k_offsets": offsets(0, 9, 7, 18)}, r"k_offsets must rise .* got \[0, 9, 7, 18\]"),
    "longer_queries": ({"max_q_len": 4}, "q_offsets must rise .* in steps of at most max_q_len = 4, got"),
    "longer_keys": ({"max_k_len": 8}, "k_offsets must rise .* in steps of at most max_k_len = 8, got"),
    "flat_memory": ({"memory": (MEMORY[0][0], MEMORY[1])}, r"memory's keys must be \(M, 3, 32\) .* got \(3, 32\)"),
    "other_memory_heads": ({"memory": (MEMORY[0], MEMORY[1][:, :2])}, "memory's values must be .* got"),
    "fewer_memory_values": ({"memory": (MEMORY[0], MEMORY[1][1:])}, r"memory's values must be .* got \(4, 3, 32\)"),
    "other_memory_dtype": ({"memory": (MEMORY[0].half(), MEMORY[1])}, "memory's keys must be .* got .* float16"),
    "negative_dropout": ({"dropout_frac": -0.1}, "dropout_frac must be at least 0 and below 1, got -0.1"),
    "full_dropout": ({"dropout_frac": 1.0, "seed": SEED}, "dropout_frac must be at least 0 and below 1, got 1.0"),
    "no_seed": ({"dropout_frac": 0.1}, r"seed must be \(\) int64 for dropout_frac = 0.1, got None"),
    "int32_seed": ({"dropout_frac": 0.1, "seed": SEED.int()}, r"seed must be \(\) int64, got \(\) int32"),
    "two_seeds": ({"dropout_frac": 0.1, "seed": torch.zeros(2).long()}, r"seed must be \(\) int64, got \(2,\) int64"),
    "other_device": ({"k_SHd": K.to("meta")}, "must be on one device, got cpu, meta, cpu, cpu, cpu, cpu and cpu"),
    "seed_elsewhere": ({"dropout_frac": 0.1, "seed": SEED.to("meta")}, "must be on one device, got cpu, .* meta"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(mistake):
    changes, message = mistake
    arguments = {"q_QHd": Q, "k_SHd": K, "v_SHd": V, "q_offsets": Q_OFFSETS, "k_offsets": K_OFFSETS}
    with pytest.raises(ValueError, match=message):
        packed_attention(**arguments | LENS | {"memory": tuple(MEMORY)} | changes)


@pytest.mark.gpu
@pytest.mark.parametrize("change", [lambda x: x.double(), lambda x: x[..., :16]], ids=["float64", "width_16"])
def test_what_the_gpu_kernels_do_not_take_is_named(change):
    with pytest.raises(ValueError, match="q must have d = 32 or 64 and no float64 on CUDA, got"):
        attend(CASES["odd"].inputs(device="cuda").map(change))
