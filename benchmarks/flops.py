"""Floating-point operations of one picture, counted by torch on tensors without memory (meta device)."""

import copy

from animals.checkpoint.view import model_class


def count(config, tokens, tiles, training=True, frozen=False) -> float:
    """FLOPs of one picture of `tokens` positions, text included, and `tiles` vision tiles; a multiply-add is two.

    training: forward, the recomputed forward of activation checkpointing, and backward; else the forward alone.
    frozen: as LoRA or the projector alone trains, without the gradients of the other weights and without a backward
    through the vision tower (what trains is below 1 %). config: LlavaNextConfig, or LlavaConfig for the whole view.
    Counted on models of few layers and extrapolated: layers are alike, so the count is linear in their number
    (tests/test_cost.py). Attention counts all pairs of tokens (what SDPA with a mask computes); a kernel that skips the
    upper triangle would do up to half of that part.
    """
    text, vision = config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers
    base, more_text, more_vision = (
        count_layers(config, t, v, tokens, tiles, training, frozen) for t, v in ((1, 2), (2, 2), (1, 3))
    )
    return base + (text - 1) * (more_text - base) + (vision - 2) * (more_vision - base)


def count_layers(config, text_layers, vision_layers, tokens, tiles, training=True, frozen=False) -> float:
    """count() by really running every layer, of a model with so many.

    Vision tower, projector and language model run as three calls: the model's own joining of picture and text looks at
    data, which meta tensors do not have; it costs nothing.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = text_layers, vision_layers
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        model = model_class(config)(config).to(torch.bfloat16).requires_grad_(not frozen)
        if training:
            model.train()
            model.activation_checkpointing_enable()
        side = config.vision_config.image_size
        pixels = torch.zeros(tiles, 3, side, side, dtype=torch.bfloat16)
        layer = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer]
        features = model.model.multi_modal_projector(layer[:, 1:])  # [tiles, patches, hidden]
        embeds = torch.zeros(1, tokens, config.text_config.hidden_size, dtype=torch.bfloat16, requires_grad=training)
        mask = torch.zeros(1, 1, tokens, tokens, dtype=torch.bfloat16)  # 4-D: taken as it is, not looked into
        hidden = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False
        ).last_hidden_state
        answer = model.lm_head(hidden[:, -3:])  # only the answer's tokens meet the head
        if training:
            (answer.sum() + features.sum()).backward()
    return float(counter.get_total_flops())
