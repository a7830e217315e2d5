"""The training step on the smallest CogVideoX and real pictures: what trains, what it learns from."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Trainer

from mm_lightning.adapters.weights import AdapterWeights, read_adapter_config
from mm_lightning.checkpoint import trainable_state_dict
from mm_lightning.config import register_resolvers
from mm_lightning.module import MagicMirrorModule, read_record, sample_generators
from mm_lightning.types import Batch
from tests.conftest import ROOT

RESAMPLER = [
    *[f"{side}.{kind}" for side in ("proj_in", "proj_out", "norm_out") for kind in ("weight", "bias")],
    *[
        f"layers.{i}.{name}"
        for i in range(2)
        for name in (
            *(f"0.{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")),
            *(f"0.{linear}.weight" for linear in ("to_q", "to_kv", "to_out")),
            *(
                f"1.{i}.{kind}"
                for i, kinds in ((0, ("weight", "bias")), (1, ("weight",)), (3, ("weight",)))
                for kind in kinds
            ),
        )
    ],
]
BOTH = ("weight", "bias")
FACE_PERCEIVER = ["face_perceiver.queries", *(f"face_perceiver.perceiver_resampler.{name}" for name in RESAMPLER)]
FRONT_END = {
    "id": [
        *(f"id_perceiver.{name}.{kind}" for name in ("token_proj.0", "token_proj.2", "token_norm") for kind in BOTH),
        *(f"id_perceiver.perceiver_resampler.{name}" for name in RESAMPLER),
    ],
    "face": [*FACE_PERCEIVER, "null_face_tokens"],
    "projection": [f"face_perceiver.projection.{kind}" for kind in BOTH],
    "fusion": [f"fusion.mlp.{i}.{kind}" for i in (0, 1, 3) for kind in BOTH],
    "can": [f"id_projection.proj.{kind}" for kind in BOTH],
}
ADAPTER = {
    "can": [f"can.phi_cond.{i}.{kind}" for i in (0, 2) for kind in BOTH],
    "norm2": [f"face.norm2.{kind}" for kind in BOTH],
    "modulation": [f"face.modulation.phi_face.1.{kind}" for kind in BOTH],
    "face": [
        *(f"face.norm1.{kind}" for kind in BOTH),
        *(f"face.key_value.{linear}.{kind}" for linear in ("to_k", "to_v", "norm_k") for kind in BOTH),
    ],
}
UNREAD = {f"transformer.transformer_blocks.2.adapter.face.norm2.{kind}" for kind in BOTH}


def names(front_end: str, adapter: str) -> set[str]:
    """Trainable names of the module, from the groups above."""
    found = {f"front_end.{name}" for group in front_end.split() for name in FRONT_END[group]}
    for block in (0, 2):
        prefix = f"transformer.transformer_blocks.{block}.adapter"
        found |= {f"{prefix}.{name}" for group in adapter.split() for name in ADAPTER[group]}
    return found - UNREAD


@pytest.fixture
def make_config(tiny_folder, sample_shards, tmp_path):
    register_resolvers()

    def make(*overrides: str, experiment: str = "stage1_image"):
        fixed = [
            f"experiment={experiment}",
            "debug=tiny",
            f"paths.shards_dir={sample_shards}",
            f"paths.run_dir={tmp_path}",
            f"model.base={tiny_folder}",
            f"model.vision={tiny_folder}/image_encoder",
            "data.height=32",
            "data.width=32",
            "data.num_workers=0",
            "data.batch_size=2",
            "global_batch_size=2",
            "model.preview_steps=2",
            *(["model.init_adapter=null"] if experiment == "stage2_video" else []),
        ]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose("train", overrides=[*fixed, *overrides])

    return make


@pytest.fixture
def make_module(make_config):
    def make(*overrides: str, **kwargs) -> MagicMirrorModule:
        torch.manual_seed(0)
        module = instantiate(make_config(*overrides, **kwargs).model)
        module.configure_model()
        return module

    return make


@pytest.fixture
def make_batch(make_config):
    def make(*overrides: str, **kwargs) -> Batch:
        return next(iter(instantiate(make_config(*overrides, **kwargs).data).train_dataloader()))

    return make


def perturb(module: MagicMirrorModule, std: float = 0.05) -> MagicMirrorModule:
    """Off the zero initialisation, where most gradients are zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += std * torch.randn(parameter.shape, generator=generator)
    return module


def step(module: MagicMirrorModule, batch: Batch, at: int = 0):
    return module.compute_loss(batch, sample_generators(0, at, batch.keys))


def test_a_stand_in_does_not_train(make_module, make_batch):
    """Of a damaged sample: another one's data under an empty key, with weight 0."""
    module, batch = make_module(), make_batch()
    module.log = lambda *args, **kwargs: None
    size = len(batch.keys)
    weights = torch.tensor([1.0] + [0.0] * (size - 1))
    loss = module.training_step(batch._replace(weights=weights), 0)
    assert size > 1
    assert loss == step(module, batch)[0].total[0]


@pytest.mark.parametrize(
    ("ablations", "expected"),
    [
        ("", names("id face projection fusion can", "can modulation norm2 face")),
        ("no_can", names("id face projection fusion", "modulation norm2 face")),
        ("no_face_branch", names("id fusion can", "can")),
        ("id_branch_only", names("id fusion", "")),
        ("no_text_branch", names("id face projection can", "can modulation norm2 face")),
        ("structure_branch_only", names("face projection", "modulation norm2 face")),
        ("no_face_modulation", names("id face projection fusion can", "can face")),
    ],
)
def test_exactly_these_names_train_and_each_gets_a_gradient(make_module, make_batch, ablations, expected):
    module = perturb(make_module(f"ablation=[{ablations}]"))
    assert set(trainable_state_dict(module)) == expected
    step(module, make_batch())[0].total.mean().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    silent = {name for name, gradient in gradients.items() if not gradient.any()}
    assert silent <= {"front_end.null_face_tokens"}  # only where no sample lost its identity


def test_null_face_tokens_learn_from_samples_without_identity(make_module, make_batch):
    module = perturb(make_module("model.identity_drop_rate=1.0"))
    step(module, make_batch())[0].total.mean().backward()
    assert module.front_end.null_face_tokens.grad.any()
    assert not module.front_end.face_perceiver.queries.grad.any()


def test_identity_loss_reaches_the_adapter_and_weight_zero_skips_the_decode(make_module, make_batch):
    drops = ("model.identity_drop_rate=0.0", "model.loss.identity.max_timestep=1000")
    batch = make_batch()
    grads = {}
    for weight in (0.0, 1.0):
        module = perturb(make_module(*drops, f"model.loss.identity_weight={weight}"))
        decodes = []
        module.face_decoder.vae.decoder.register_forward_pre_hook(lambda _, args, seen=decodes: seen.extend(args[0]))
        loss, _ = step(module, batch)
        loss.total.mean().backward()
        grads[weight] = module.transformer.transformer_blocks[0].adapter.can.phi_cond[2].weight.grad
        assert len(decodes) == (len(batch.keys) if weight else 0)
    assert not torch.equal(grads[0.0], grads[1.0])


def test_references_are_embedded_once_where_condition_and_loss_share_the_recogniser(make_module, make_batch):
    """The identity query, averaged, is what the loss's own network says of the same photos."""
    module, batch = make_module(experiment="stage2_video"), make_batch(experiment="stage2_video")
    assert module.recognizer == module.loss_recognizer
    features = module.encode_features(batch)
    reused = module.embed_references(batch, features)
    module.loss_recognizer = "another"
    torch.testing.assert_close(module.embed_references(batch, features), reused, rtol=0, atol=1e-5)


def count_calls(function, calls):
    def counted(*args):
        calls.append(1)
        return function(*args)

    return counted


def test_a_sample_that_lost_its_identity_has_no_identity_loss(make_module, make_batch):
    module = make_module("model.identity_drop_rate=1.0", "model.loss.identity.max_timestep=1000")
    loss, _ = step(module, make_batch())
    assert loss.terms["identity"].isnan().all()
    assert loss.total.isfinite().all()


def test_a_samples_loss_does_not_depend_on_its_batch(make_module, make_batch):
    module = perturb(make_module())
    batch = make_batch("data.batch_size=4", "global_batch_size=4")
    with torch.no_grad():
        together = step(module, batch)[0].total
        for i in range(4):
            one = Batch(*(None if field is None else field[i : i + 1] for field in batch))
            torch.testing.assert_close(step(module, one)[0].total, together[i : i + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("experiment", ["stage1_image", "stage2_video"])
def test_cached_tensors_give_the_loss_that_fresh_ones_give(make_module, make_batch, experiment):
    module = perturb(make_module(experiment=experiment))
    batch = make_batch(experiment=experiment)
    with torch.no_grad():
        fresh = step(module, batch)[0].total
        cached = batch._replace(
            pixels=None,
            latent_moments=module.backbone.encode_video(batch.pixels),
            text=module.encode_text(batch),
            face=module.encode_features(batch),
        )
        assert torch.equal(step(module, cached)[0].total, fresh)


def test_cached_training_needs_neither_vae_nor_text_encoder(make_module, make_batch):
    whole, batch = make_module(), make_batch()
    lean = make_module("model.components=[transformer]", "model.text_drop_rate=0.0", "ablation=no_identity_loss")
    assert lean.backbone.vae is None
    assert lean.text is None
    with torch.no_grad():
        cached = batch._replace(
            pixels=None, latent_moments=whole.backbone.encode_video(batch.pixels), text=whole.encode_text(batch)
        )
        assert step(lean, cached)[0].total.isfinite().all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.components=[transformer,vae]"], "text_drop_rate=0.1 needs what T5 says of the empty prompt"),
        (["model.components=[transformer]", "model.text_drop_rate=0.0"], "add vae to model.components"),
        (["model.preview_steps=0"], "model.preview_steps=0: give a number from 1"),
    ],
)
def test_what_a_setting_needs_is_told_at_once(make_config, overrides, message):
    with pytest.raises(InstantiationException, match=message):
        instantiate(make_config(*overrides).model)


def test_another_recogniser_is_another_condition(make_module, make_config, tmp_path):
    """128 numbers both, and not the same ones."""
    make_module().save_adapter(tmp_path / "adapter")
    started = ["model.recognizer=dlib_standardized", f"model.init_adapter={tmp_path}/adapter"]
    with pytest.raises(InstantiationException, match=r"another recogniser of the condition .*'dlib' there"):
        instantiate(make_config(*started).model)


def test_odd_latent_frames_on_cogvideox_1_5(make_module, make_batch, tiny_1_5_folder):
    """Its transformer takes frames in pairs; three latent frames train all the same."""
    module = perturb(make_module(f"model.base={tiny_1_5_folder}", experiment="stage2_video"))
    loss, sample = step(module, make_batch(experiment="stage2_video"))
    assert sample.latents.shape[1] == 3
    loss.total.mean().backward()


def test_bf16_base_keeps_noise_target_and_trained_part_in_fp32(make_module, make_batch):
    module = perturb(make_module("model.base_dtype=bfloat16"))
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        loss, sample = step(module, make_batch())
    assert {t.dtype for t in sample if t.is_floating_point()} == {torch.float32}
    assert loss.total.dtype == torch.float32
    loss.total.mean().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)
    reference = perturb(make_module())
    torch.testing.assert_close(loss.total, step(reference, make_batch())[0].total, rtol=0.02, atol=0.02)


def fit(config, max_steps: int, ckpt_path: str | None = None, **trainer) -> tuple[MagicMirrorModule, Trainer]:
    torch.manual_seed(0)
    module = instantiate(config.model)
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, **trainer}
    trainer = Trainer(max_steps=max_steps, enable_model_summary=False, gradient_clip_val=1.0, **options)
    trainer.fit(module, instantiate(config.data), ckpt_path=ckpt_path, weights_only=True)
    return module, trainer


def test_training_moves_what_trains_and_nothing_else(make_module, make_config, tmp_path):
    before = {name: value.clone() for name, value in make_module().state_dict().items()}
    module, _ = fit(make_config(), 3, default_root_dir=tmp_path, enable_checkpointing=False)
    trainable = set(trainable_state_dict(module))
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trainable


def test_checkpoints_hold_what_trains_and_adapters_come_back(make_config, make_module, make_batch, tmp_path):
    module, trainer = fit(make_config(), 2, default_root_dir=tmp_path, enable_checkpointing=False)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(trainable_state_dict(module))
    assert read_record(tmp_path / "last.ckpt") == module.record()

    module.save_adapter(tmp_path / "adapter")
    assert set(AdapterWeights.from_pretrained(tmp_path / "adapter").state) == set(checkpoint["state_dict"])
    assert read_adapter_config(tmp_path / "adapter")["base"] == module.base_id
    again = make_module(f"model.init_adapter={tmp_path / 'adapter'}")
    batch = make_batch()
    with torch.no_grad():
        assert torch.equal(step(again, batch)[0].total, step(module, batch)[0].total)


def test_what_was_made_for_another_model_is_refused_before_loading(
    make_config, make_module, tiny_2b_folder, tmp_path, monkeypatch
):
    make_module().save_adapter(tmp_path / "adapter")
    monkeypatch.setattr("mm_lightning.module.Backbone.from_pretrained", pytest.fail)
    adapter = f"model.init_adapter={tmp_path / 'adapter'}"
    with pytest.raises(InstantiationException, match=r"another base model \(config_sha256"):
        instantiate(make_config(adapter, f"model.base={tiny_2b_folder}").model)
    with pytest.raises(InstantiationException, match=r"another adapter preset \(hidden_dim: 64 there, 32 here"):
        instantiate(make_config(adapter, "model.adapter.hidden_dim=32").model)
    with pytest.raises(InstantiationException, match="another front-end"):
        instantiate(make_config(adapter, "model.face_perceiver.num_tokens=4").model)
    with pytest.raises(InstantiationException, match="is not an adapter folder"):
        instantiate(make_config("model.init_adapter=nowhere").model)
    with pytest.raises(InstantiationException, match="base model folder"):
        instantiate(make_config("model.base=nowhere").model)
    with pytest.raises(InstantiationException, match="No CLIP vision encoder at nowhere"):
        instantiate(make_config("model.vision=nowhere").model)


def test_preview_shows_a_clip_of_the_batch(make_module, make_batch):
    module = perturb(make_module(experiment="stage2_video")).eval()
    batch = make_batch("data.batch_size=1", "global_batch_size=1", experiment="stage2_video")
    preview = module.generate_preview(batch)
    assert preview.prompt == batch.captions[0]
    assert preview.video.shape == preview.denoised.shape == batch.pixels[0].shape
    assert torch.equal(preview.reference, batch.references[0, 0])
    again = module.generate_preview(batch)
    assert torch.equal(preview.video, again.video)
    other = module.generate_preview(batch._replace(references=batch.references.flip(-1)))
    assert not torch.equal(preview.video, other.video)


def test_draws_follow_seed_step_and_key_alone():
    def draw(*args):
        return [torch.rand((), generator=g).item() for g in sample_generators(*args)]

    assert draw(0, 1, ["a", "b"]) == draw(0, 1, ["a", "b"]) == draw(0, 1, ["b", "a"])[::-1]
    assert len({*draw(0, 1, ["a", "b"]), *draw(0, 2, ["a", "b"]), *draw(1, 1, ["a", "b"])}) == 6


def test_losses_fall_when_one_batch_is_learned(make_module, make_batch):
    """The adapter on a frozen random backbone can fit one batch at one noise draw: the gradient points downhill."""
    module, batch = make_module("model.loss.identity_weight=0"), make_batch()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = step(module, batch)[0].total.mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
