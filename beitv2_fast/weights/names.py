"""What every parameter is called in each format: tables of names, read in both directions.

``{i}`` is the number of a block, ``*`` is weight or bias. A tuple of names stands for one tensor of ours that the other
format has in pieces, joined along dimension 0. A name of ours that a format's table lacks has no place in its classes.
"""

from __future__ import annotations

from ..quantize.states import REFERENCE_NAMES, REFERENCE_UNUSED

Names = dict[str, str | tuple[str, ...]]  # ours -> theirs

BIAS_TABLE, BIAS_INDEX = "relative_position_bias_table", "relative_position_index"

# The published checkpoints and timm agree with these names but for what the tables below say.
EMBEDDING = ("cls_token", "pos_embed", "patch_embed.proj.*", f"rel_pos_bias.{BIAS_TABLE}")
BLOCK = (
    "norm1.*", "attn.qkv.weight", "attn.q_bias", "attn.v_bias", f"attn.{BIAS_TABLE}", "attn.proj.*", "gamma_1",
    "norm2.*", "mlp.fc1.*", "mlp.fc2.*", "gamma_2",
)  # fmt: skip
VIT = (*EMBEDDING, *(f"blocks.{{i}}.{name}" for name in BLOCK))
CLASSIFIER = ("fc_norm.*", "head.*")
STUDENT = ("norm.*", "mask_token", "lm_head.*")
AGGREGATION = (*(f"cls_pt_layers.{{i}}.{name}" for name in BLOCK), "cls_pt_norm.*", "cls_pt_lm_head.*")
SEGMENTER_HEADS = ("fpn1.", "fpn2.", "decode_head.", "auxiliary_head.")  # as mmsegmentation and we call them
TOKENIZER_NAMES = (
    *(f"{part}.{name}" for part in ("encoder", "decoder") for name in (*VIT, "fc_norm.*")),
    *(f"{part}_task_layer.{layer}.*" for part in ("encode", "decode") for layer in (0, 2)),
)
# ours -> published. An EMA of a code's uses and whether k-means has run; both keep counters that the other lacks.
QUANTIZER = {f"quantize.{ours}": f"quantize.{theirs}" for theirs, ours in REFERENCE_NAMES.items()}
OUR_COUNTERS = ("quantize.idle", "quantize.steps")
# What published files hold and no model reads: statistics that the reference never uses, and parts of its training.
PUBLISHED_COUNTERS = tuple(f"quantize.{name}" for name in REFERENCE_UNUSED)
PUBLISHED_UNUSED = (*PUBLISHED_COUNTERS, "teacher_model.", "scaling_layer.", "loss.")

# transformers' files, which every version of its from_pretrained reads
LAYER = "beit.encoder.layer.{i}"
TRANSFORMERS: Names = {
    "cls_token": "beit.embeddings.cls_token",
    "mask_token": "beit.embeddings.mask_token",
    "pos_embed": "beit.embeddings.position_embeddings",
    "patch_embed.proj.*": "beit.embeddings.patch_embeddings.projection.*",
    f"rel_pos_bias.{BIAS_TABLE}": f"beit.encoder.relative_position_bias.{BIAS_TABLE}",
    "blocks.{i}.norm1.*": f"{LAYER}.layernorm_before.*",
    "blocks.{i}.attn.qkv.weight": (
        f"{LAYER}.attention.attention.query.weight",
        f"{LAYER}.attention.attention.key.weight",
        f"{LAYER}.attention.attention.value.weight",
    ),
    "blocks.{i}.attn.q_bias": f"{LAYER}.attention.attention.query.bias",
    "blocks.{i}.attn.v_bias": f"{LAYER}.attention.attention.value.bias",
    f"blocks.{{i}}.attn.{BIAS_TABLE}": f"{LAYER}.attention.attention.relative_position_bias.{BIAS_TABLE}",
    "blocks.{i}.attn.proj.*": f"{LAYER}.attention.output.dense.*",
    "blocks.{i}.gamma_1": f"{LAYER}.lambda_1",
    "blocks.{i}.norm2.*": f"{LAYER}.layernorm_after.*",
    "blocks.{i}.mlp.fc1.*": f"{LAYER}.intermediate.dense.*",
    "blocks.{i}.mlp.fc2.*": f"{LAYER}.output.dense.*",
    "blocks.{i}.gamma_2": f"{LAYER}.lambda_2",
    "norm.*": "layernorm.*",
    "lm_head.*": "lm_head.*",
    "fc_norm.*": "beit.pooler.layernorm.*",
    "head.*": "classifier.*",
}

# the modules of transformers 5, which its state_dict() shows and its files do not
MODULE = "beit.layers.{i}"
TRANSFORMERS_MODULES: Names = {
    **TRANSFORMERS,
    f"rel_pos_bias.{BIAS_TABLE}": f"beit.shared_position_bias.{BIAS_TABLE}",
    "blocks.{i}.norm1.*": f"{MODULE}.layernorm_before.*",
    "blocks.{i}.attn.qkv.weight": (
        f"{MODULE}.attention.q_proj.weight",
        f"{MODULE}.attention.k_proj.weight",
        f"{MODULE}.attention.v_proj.weight",
    ),
    "blocks.{i}.attn.q_bias": f"{MODULE}.attention.q_proj.bias",
    "blocks.{i}.attn.v_bias": f"{MODULE}.attention.v_proj.bias",
    f"blocks.{{i}}.attn.{BIAS_TABLE}": f"{MODULE}.relative_position_bias.{BIAS_TABLE}",
    "blocks.{i}.attn.proj.*": f"{MODULE}.attention.o_proj.*",
    "blocks.{i}.gamma_1": f"{MODULE}.lambda_1",
    "blocks.{i}.norm2.*": f"{MODULE}.layernorm_after.*",
    "blocks.{i}.mlp.fc1.*": f"{MODULE}.mlp.fc1.*",
    "blocks.{i}.mlp.fc2.*": f"{MODULE}.mlp.fc2.*",
    "blocks.{i}.gamma_2": f"{MODULE}.lambda_2",
}


def _same(*names: str) -> Names:
    return {name: name for name in names}


OURS: Names = _same(*VIT, *CLASSIFIER, *STUDENT, *AGGREGATION, *TOKENIZER_NAMES, *QUANTIZER, *OUR_COUNTERS)
FORMATS: dict[str, Names] = {
    "beitv2_fast": OURS,
    "published": {**_same(*VIT, *CLASSIFIER, *STUDENT, *AGGREGATION, *TOKENIZER_NAMES), **QUANTIZER},
    "timm": _same(*VIT, *CLASSIFIER, "norm.*"),
    "transformers": TRANSFORMERS,
    "transformers_modules": TRANSFORMERS_MODULES,
}
