"""Floating-point operations of one picture, counted by torch on tensors without memory (meta device)."""


def count(config, tokens, tiles, training=True) -> float:
    """FLOPs of one picture of `tokens` image tokens from `tiles` vision-tower tiles; a multiply-add counts as two.

    training: forward, the recomputed forward of activation checkpointing, and backward; else the forward alone.
    config: LlavaNextConfig. Vision tower, projector and language model run as three calls: the model's own joining of
    picture and text looks at data, which meta tensors do not have; it costs nothing. Attention counts all pairs of
    tokens (what SDPA with a mask computes); a kernel that skips the upper triangle would do up to half of that part.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlavaNextForConditionalGeneration

    config._attn_implementation = "eager"
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        model = LlavaNextForConditionalGeneration(config).to(torch.bfloat16)
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
