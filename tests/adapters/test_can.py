import torch

from mm_lightning.adapters.can import ConditionedAdaptiveNorm, ConstantFaceNorm, FaceAdaptiveNorm, split_modulation

B, D, E_T, C1, H = 2, 8, 5, 3, 7


def inputs():
    torch.manual_seed(0)
    return torch.randn(B, 12 * D), torch.randn(B, E_T), torch.randn(B, C1)


def test_can_adds_nothing_at_initialisation():
    modulation, temb, id_embed = inputs()
    assert torch.equal(ConditionedAdaptiveNorm(D, E_T, C1, H)(modulation, temb, id_embed), modulation)


def test_can_is_equation_7():
    modulation, temb, id_embed = (x.double() for x in inputs())
    can = ConditionedAdaptiveNorm(D, E_T, C1, H).double()
    torch.nn.init.normal_(can.phi_cond[2].weight)
    torch.nn.init.normal_(can.phi_cond[2].bias)
    w1, b1, w2, b2 = can.phi_cond[0].weight, can.phi_cond[0].bias, can.phi_cond[2].weight, can.phi_cond[2].bias
    hidden = torch.cat([id_embed, temb, modulation[:, :D]], 1) @ w1.T + b1
    expected = modulation + (hidden / (1 + torch.exp(-hidden))) @ w2.T + b2
    torch.testing.assert_close(can(modulation, temb, id_embed), expected, rtol=0, atol=1e-12)


def test_face_norm_is_zero_at_initialisation_with_and_without_a_hidden_layer():
    _, temb, _ = inputs()
    for norm in (FaceAdaptiveNorm(D, E_T), FaceAdaptiveNorm(D, E_T, hidden_dim=4), ConstantFaceNorm(D, E_T)):
        assert torch.equal(norm(temb), torch.zeros(B, 6 * D))


def test_split_keeps_diffusers_order():
    modulation = torch.arange(12.0).repeat_interleave(D).expand(B, -1)
    streams = split_modulation(modulation, num_streams=4)
    assert [[factor[0, 0, 0].item() for factor in stream] for stream in streams] == [
        [0, 1, 2],  # norm1 video
        [3, 4, 5],  # norm1 text
        [6, 7, 8],  # norm2 video
        [9, 10, 11],  # norm2 text
    ]
