"""Every setting of every stage has a test that fails if the setting has no effect, or a slightly wrong one."""

import ast
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import get_args, get_type_hints

import pytest

from support import ROOT
from train.config.clip import ClipConfig
from train.config.distill import DistillConfig
from train.config.ldm import LdmConfig
from train.config.run import RunConfig
from train.config.vae import VaeConfig

SHARED = {
    "settings_run::test_steps_equal_plain_torch": (
        "steps ema_decay optimizer.kind optimizer.lr optimizer.schedule optimizer.final optimizer.warmup "
        "optimizer.betas optimizer.eps optimizer.momentum optimizer.newton_schulz optimizer.weight_decay "
        "optimizer.clip"
    ),
    "settings_run::test_the_seed_determines_weights_and_order": "seed batch_size accumulation",
    "settings_run::test_the_loop_acts_at_the_configured_steps": (
        "out checkpoint_every keep_checkpoints validate_every log_every"
    ),
    "settings_run::test_the_first_sheet_is_drawn_after_so_many_minutes": "first_samples",
    "settings_run::test_networks_compute_in_the_precision": "precision",
    "settings_run::test_networks_are_compiled_in_place": "compile",
    "settings_run::test_the_cache_is_in_its_folder": "cache",
    "settings_run::test_batches_are_read_by_as_many_workers": "workers",
    "settings_run::test_weights_are_restored_after_so_many_steps": "roll_back_after",
    "progress::test_tensorboard_has_each_step_once_and_the_sheets": "trackers",
    "model_card::test_a_licence_is_stated_when_it_is_given": "license",
    "settings_data::test_datasets_are_read_as_configured": (
        "data input.image_column input.caption_template input.caption_from_names "
        "input.caption_files input.encoding input.reading input.train_split input.validation_split"
    ),
    "caption_columns::test_captions_are_drawn_from_the_columns": "input.caption_column",
    "settings_data::test_links_out_of_the_folder_are_followed_only_if_configured": "input.follow_links",
    "duplicates::test_copies_are_left_out": "input.duplicates input.copies",
    "settings_data::test_an_epoch_repeats_images": "input.repeats",
    "settings_data::test_tags_are_left_out_and_shuffled": "input.tag_dropout input.tag_shuffle input.tag_variants",
    "settings_data::test_a_share_of_the_images_is_held_out": "input.validation_fraction",
    "settings_data::test_a_stream_is_shuffled_in_a_buffer_of_this_size": "input.stream_buffer",
    "settings_data::test_images_above_and_below_the_sizes_are_left_out": "input.max_pixels input.min_size",
    "settings_data::test_images_are_framed_as_configured": "input.background input.crop input.flip",
    "settings_data::test_the_resolution_resizes_images": "input.resolution",
    "settings_data::test_cached_crops_are_those_of_the_images": "input.crops",
    "settings_data::test_buckets_have_multiples_of_their_number_within_the_ratio": "input.buckets input.bucket_ratio",
    "settings_data::test_training_stops_above_the_share_of_damaged_images": "input.max_damaged",
}
CLIP = {
    "settings_clip::test_the_towers_have_their_shapes": (
        "text.vocab_size text.max_length text.width text.layers text.heads "
        "image.patch_size image.width image.layers image.heads projection"
    ),
    "settings_clip::test_the_loss_is_the_contrastive_one_and_the_weighted_tasks": "tokens.sketch tokens.echo",
}
VAE = {
    "settings_vae::test_losses_equal_the_papers_formulas": (
        "reconstruction kl_weight learn_logvar adversarial.kind adversarial.weight adversarial.adaptive adversarial.r1"
    ),
    "settings_vae::test_a_clip_measures_the_perceptual_distance": "perceptual.model perceptual.weight",
    "settings_vae::test_kinds_of_lpips_have_their_networks": "perceptual.kind",
    "settings_vae::test_the_discriminator_starts_at_its_step": "adversarial.start",
    "settings_run::test_steps_equal_plain_torch": "adversarial.lr",
    "settings_vae::test_the_discriminator_has_its_shape": "adversarial.channels adversarial.layers",
    "settings_vae::test_spectral_normalisation_keeps_the_largest_singular_value_at_1": "adversarial.spectral_norm",
    "settings_vae::test_latents_are_transformed_in_their_share_of_steps": "equivariance.share equivariance.smallest",
    "settings_vae::test_the_autoencoder_has_its_shape": (
        "model.channels model.layers model.latent_channels model.groups model.attention"
    ),
    "settings_vae::test_gradient_checkpointing_computes_activations_twice": "gradient_checkpointing",
    "encode_once::test_stage_2_takes_what_stage_1_encoded": "encode_once",
    "settings_vae::test_latents_are_normalised_as_configured": "normalisation",
    "settings_vae::test_training_starts_from_init_and_moves_what_it_should": "init decoder_only",
    "settings_vae::test_validation_measures_the_averaged_weights_on_so_many_images": (
        "validation_examples validation_features"
    ),
}
LDM = {
    "settings_ldm::test_losses_equal_the_papers_formulas": (
        "diffusion.schedule diffusion.timesteps diffusion.beta_start diffusion.beta_end diffusion.zero_terminal_snr "
        "diffusion.shift diffusion.target diffusion.variance diffusion.objective diffusion.weighting diffusion.gamma "
        "diffusion.p2_gamma diffusion.sigma_data diffusion.loss diffusion.logit_mean diffusion.logit_std "
        "diffusion.spacing"
    ),
    "settings_ldm::test_importance_sampling_follows_the_losses_and_corrects_for_it": "diffusion.timestep_sampling",
    "settings_ldm::test_draws_are_functions_of_seed_and_position": (
        "caption_dropout diffusion.stratified diffusion.offset_noise"
    ),
    "settings_ldm::test_the_network_has_its_shape": (
        "unet.channels unet.layers unet.attention unet.heads unet.depth unet.modulation unet.groups "
        "unet.linear_projections"
    ),
    "settings_ldm::test_the_parts_are_those_that_are_named": "init vae text_encoder",
    "settings_ldm::test_features_skip_layers_and_have_their_chunks": "clip_skip text_chunks",
    "settings_ldm::test_the_task_determines_the_input": "task",
    "encode_once::test_stage_2_takes_what_stage_1_encoded": "encode_once",
    "settings_ldm::test_the_attention_is_the_configured_one": "attention",
    "settings_ldm::test_gradient_checkpointing_computes_activations_twice": "gradient_checkpointing",
    "settings_ldm::test_validation_measures_the_averaged_weights_on_so_many_examples": (
        "validation_examples validation_draws"
    ),
    "overfitting::test_weights_are_kept_only_if_configured": "keep_best",
    "overfitting::test_evaluation_does_not_change_the_training": (
        "evaluate_every evaluation_images evaluation_features"
    ),
    "settings_ldm::test_sheets_are_sampled_as_configured": "prompts sample_steps guidance_scale",
}
LATENT = {test: names for test, names in LDM.items() if test.startswith("overfitting::")} | {
    "encode_once::test_stage_2_takes_what_stage_1_encoded": "encode_once",
    "settings_ldm::test_the_attention_is_the_configured_one": "attention",
    "settings_ldm::test_gradient_checkpointing_computes_activations_twice": "gradient_checkpointing",
    "settings_ldm::test_validation_measures_the_averaged_weights_on_so_many_examples": (
        "validation_examples validation_draws"
    ),
    "settings_ldm::test_sheets_are_sampled_as_configured": "prompts sample_steps guidance_scale",
}
"""The settings that stage 2 shares with distillation, whose code is the same."""
DISTILL = LATENT | {
    "distillation::test_guidance_is_learned_from_two_predictions": "teacher method scales weight_noise",
    "distillation::test_consistency_is_learned_from_a_step_of_ddim": "solver_steps huber",
    "distillation::test_consistency_is_learned_from_whole_trajectories": "trajectory levels on_policy",
    "distillation::test_an_adversarial_term_trains_both_networks": "adversarial adversarial_lr",
}
"""The tests, and the settings for which each of them fails."""


def settings(config: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of a configuration's settings."""
    kinds = get_type_hints(config)
    for field in fields(config):
        inner = [kind for kind in (kinds[field.name], *get_args(kinds[field.name])) if is_dataclass(kind)]
        for kind in inner:
            yield from settings(kind, f"{prefix}{field.name}.")
        if not inner:
            yield prefix + field.name


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / f"tests/test_{file}.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(
    ("config", "own"), [(ClipConfig, CLIP), (VaeConfig, VAE), (LdmConfig, LDM), (DistillConfig, DISTILL)]
)
def test_every_setting_has_a_test(config: type[RunConfig], own: dict[str, str]) -> None:
    listed = [name for table in (SHARED, own) for names in table.values() for name in names.split()]
    assert sorted(listed) == sorted(settings(config))
    for test in SHARED.keys() | own.keys():
        file, name = test.split("::")
        assert name in names_in(file), test
