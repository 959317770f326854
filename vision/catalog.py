"""The image models. Data only: importing this imports no torch."""

from __future__ import annotations

from manyheads.core.catalog import Entry, Task

TASKS: tuple[Task, ...] = (
    Task(
        name="classification",
        summary="which class an image is of, or which of several labels it has",
        training="manyheads.vision.task:ImageClassifier",
        data="manyheads.vision.data:ImageData",
        predictor="manyheads.vision.predictor:Predictor",
    ),
)

# The architectures of timm 1.0.31 by its modules; a test says when the installed timm has others.
VIT = """
aimv2_1b_patch14_224 aimv2_1b_patch14_336 aimv2_1b_patch14_448 aimv2_3b_patch14_224 aimv2_3b_patch14_336
aimv2_3b_patch14_448 aimv2_huge_patch14_224 aimv2_huge_patch14_336 aimv2_huge_patch14_448
aimv2_large_patch14_224 aimv2_large_patch14_336 aimv2_large_patch14_448 beit3_base_patch16_224
beit3_giant_patch14_224 beit3_giant_patch14_336 beit3_large_patch16_224 eva_large_patch14_196
eva_large_patch14_336 flexivit_base flexivit_large flexivit_small test_vit test_vit2 test_vit3 test_vit4
vit_base_patch8_224 vit_base_patch14_dinov2 vit_base_patch14_reg1_tipsv2 vit_base_patch14_reg4_dinov2
vit_base_patch16_18x2_224 vit_base_patch16_224 vit_base_patch16_224_miil vit_base_patch16_384
vit_base_patch16_clip_224 vit_base_patch16_clip_384 vit_base_patch16_clip_quickgelu_224
vit_base_patch16_gap_224 vit_base_patch16_plus_240 vit_base_patch16_plus_clip_240 vit_base_patch16_radio_v3
vit_base_patch16_reg4_gap_256 vit_base_patch16_rpn_224 vit_base_patch16_siglip_224
vit_base_patch16_siglip_256 vit_base_patch16_siglip_384 vit_base_patch16_siglip_512
vit_base_patch16_siglip_gap_224 vit_base_patch16_siglip_gap_256 vit_base_patch16_siglip_gap_384
vit_base_patch16_siglip_gap_512 vit_base_patch16_xp_224 vit_base_patch32_224 vit_base_patch32_384
vit_base_patch32_clip_224 vit_base_patch32_clip_256 vit_base_patch32_clip_384 vit_base_patch32_clip_448
vit_base_patch32_clip_quickgelu_224 vit_base_patch32_plus_256 vit_base_patch32_siglip_256
vit_base_patch32_siglip_gap_256 vit_betwixt_patch16_gap_256 vit_betwixt_patch16_reg1_gap_256
vit_betwixt_patch16_reg4_gap_256 vit_betwixt_patch16_reg4_gap_384 vit_betwixt_patch32_clip_224
vit_dlittle_patch16_reg1_gap_256 vit_dpwee_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256
vit_giant_patch14_224 vit_giant_patch14_clip_224 vit_giant_patch14_dinov2 vit_giant_patch14_reg1_tipsv2
vit_giant_patch14_reg4_dinov2 vit_giant_patch16_gap_224 vit_giant_patch16_radio_v3
vit_giantopt_patch16_siglip_256 vit_giantopt_patch16_siglip_384 vit_giantopt_patch16_siglip_gap_256
vit_giantopt_patch16_siglip_gap_384 vit_gigantic_patch14_224 vit_gigantic_patch14_clip_224
vit_gigantic_patch14_clip_378 vit_gigantic_patch14_clip_quickgelu_224 vit_huge_patch14_224
vit_huge_patch14_clip_224 vit_huge_patch14_clip_336 vit_huge_patch14_clip_378
vit_huge_patch14_clip_quickgelu_224 vit_huge_patch14_clip_quickgelu_378 vit_huge_patch14_gap_224
vit_huge_patch14_xp_224 vit_huge_patch16_gap_448 vit_huge_patch16_radio_v3 vit_huge_patch16_radio_v4
vit_intern300m_patch14_448 vit_large_patch14_224 vit_large_patch14_clip_224 vit_large_patch14_clip_336
vit_large_patch14_clip_quickgelu_224 vit_large_patch14_clip_quickgelu_336 vit_large_patch14_dinov2
vit_large_patch14_reg1_tipsv2 vit_large_patch14_reg4_dinov2 vit_large_patch14_xp_224 vit_large_patch16_224
vit_large_patch16_384 vit_large_patch16_radio_v3 vit_large_patch16_siglip_256 vit_large_patch16_siglip_384
vit_large_patch16_siglip_512 vit_large_patch16_siglip_gap_256 vit_large_patch16_siglip_gap_384
vit_large_patch16_siglip_gap_512 vit_large_patch32_224 vit_large_patch32_384 vit_little_patch16_reg1_gap_256
vit_little_patch16_reg4_gap_256 vit_medium_patch16_clip_224 vit_medium_patch16_gap_240
vit_medium_patch16_gap_256 vit_medium_patch16_gap_384 vit_medium_patch16_reg1_gap_256
vit_medium_patch16_reg4_gap_256 vit_medium_patch32_clip_224 vit_mediumd_patch16_reg4_gap_256
vit_mediumd_patch16_reg4_gap_384 vit_pwee_patch16_reg1_gap_256 vit_small_patch8_224 vit_small_patch14_dinov2
vit_small_patch14_reg4_dinov2 vit_small_patch16_18x2_224 vit_small_patch16_36x1_224 vit_small_patch16_224
vit_small_patch16_384 vit_small_patch32_224 vit_small_patch32_384 vit_so150m2_patch16_reg1_gap_256
vit_so150m2_patch16_reg1_gap_384 vit_so150m2_patch16_reg1_gap_448 vit_so150m_patch16_reg4_gap_256
vit_so150m_patch16_reg4_gap_384 vit_so150m_patch16_reg4_map_256 vit_so400m_patch14_reg1_tipsv2
vit_so400m_patch14_siglip_224 vit_so400m_patch14_siglip_378 vit_so400m_patch14_siglip_384
vit_so400m_patch14_siglip_gap_224 vit_so400m_patch14_siglip_gap_378 vit_so400m_patch14_siglip_gap_384
vit_so400m_patch14_siglip_gap_448 vit_so400m_patch14_siglip_gap_896 vit_so400m_patch16_radio_v4
vit_so400m_patch16_siglip_256 vit_so400m_patch16_siglip_384 vit_so400m_patch16_siglip_512
vit_so400m_patch16_siglip_gap_256 vit_so400m_patch16_siglip_gap_384 vit_so400m_patch16_siglip_gap_512
vit_tiny_patch16_224 vit_tiny_patch16_384 vit_wee_patch16_reg1_gap_256 vit_xsmall_patch16_clip_224
"""
DEIT = """
deit3_base_patch16_224 deit3_base_patch16_384 deit3_huge_patch14_224 deit3_large_patch16_224
deit3_large_patch16_384 deit3_medium_patch16_224 deit3_small_patch16_224 deit3_small_patch16_384
deit_base_distilled_patch16_224 deit_base_distilled_patch16_384 deit_base_patch16_224 deit_base_patch16_384
deit_small_distilled_patch16_224 deit_small_patch16_224 deit_tiny_distilled_patch16_224
deit_tiny_patch16_224
"""
HYBRID = """
vit_base_mci_224 vit_base_r26_s32_224 vit_base_r50_s16_224 vit_base_r50_s16_384 vit_base_resnet26d_224
vit_base_resnet50d_224 vit_large_r50_s32_224 vit_large_r50_s32_384 vit_small_r26_s32_224
vit_small_r26_s32_384 vit_small_resnet26d_224 vit_small_resnet50d_s16_224 vit_tiny_r_s16_p8_224
vit_tiny_r_s16_p8_384
"""
RELPOS = """
test_vit_relpos vit_relpos_base_patch16_224 vit_relpos_base_patch16_cls_224
vit_relpos_base_patch16_clsgap_224 vit_relpos_base_patch16_plus_240 vit_relpos_base_patch16_rpn_224
vit_relpos_base_patch32_plus_rpn_256 vit_relpos_medium_patch16_224 vit_relpos_medium_patch16_cls_224
vit_relpos_medium_patch16_rpn_224 vit_relpos_small_patch16_224 vit_relpos_small_patch16_rpn_224
vit_srelpos_medium_patch16_224 vit_srelpos_small_patch16_224
"""
SWIN = """
swin_base_patch4_window7_224 swin_base_patch4_window12_384 swin_large_patch4_window7_224
swin_large_patch4_window12_384 swin_s3_base_224 swin_s3_small_224 swin_s3_tiny_224
swin_small_patch4_window7_224 swin_tiny_patch4_window7_224
"""
SWIN_V2 = """
swinv2_base_window8_256 swinv2_base_window12_192 swinv2_base_window12to16_192to256
swinv2_base_window12to24_192to384 swinv2_base_window16_256 swinv2_large_window12_192
swinv2_large_window12to16_192to256 swinv2_large_window12to24_192to384 swinv2_small_window8_256
swinv2_small_window16_256 swinv2_tiny_window8_256 swinv2_tiny_window16_256
"""
SWIN_V2_CR = """
swinv2_cr_base_224 swinv2_cr_base_384 swinv2_cr_base_ns_224 swinv2_cr_giant_224 swinv2_cr_giant_384
swinv2_cr_huge_224 swinv2_cr_huge_384 swinv2_cr_large_224 swinv2_cr_large_384 swinv2_cr_small_224
swinv2_cr_small_384 swinv2_cr_small_ns_224 swinv2_cr_small_ns_256 swinv2_cr_tiny_224 swinv2_cr_tiny_384
swinv2_cr_tiny_ns_224
"""
MAXVIT = """
maxvit_base_tf_224 maxvit_base_tf_384 maxvit_base_tf_512 maxvit_large_tf_224 maxvit_large_tf_384
maxvit_large_tf_512 maxvit_nano_rw_256 maxvit_pico_rw_256 maxvit_rmlp_base_rw_224 maxvit_rmlp_base_rw_384
maxvit_rmlp_nano_rw_256 maxvit_rmlp_pico_rw_256 maxvit_rmlp_small_rw_224 maxvit_rmlp_small_rw_256
maxvit_rmlp_tiny_rw_256 maxvit_small_tf_224 maxvit_small_tf_384 maxvit_small_tf_512 maxvit_tiny_pm_256
maxvit_tiny_rw_224 maxvit_tiny_rw_256 maxvit_tiny_tf_224 maxvit_tiny_tf_384 maxvit_tiny_tf_512
maxvit_xlarge_tf_224 maxvit_xlarge_tf_384 maxvit_xlarge_tf_512 maxxvit_rmlp_nano_rw_256
maxxvit_rmlp_small_rw_256 maxxvit_rmlp_tiny_rw_256 maxxvitv2_nano_rw_256 maxxvitv2_rmlp_base_rw_224
maxxvitv2_rmlp_base_rw_384 maxxvitv2_rmlp_large_rw_224 test_maxvit
"""
COATNET = """
coatnet_0_224 coatnet_0_rw_224 coatnet_1_224 coatnet_1_rw_224 coatnet_2_224 coatnet_2_rw_224 coatnet_3_224
coatnet_3_rw_224 coatnet_4_224 coatnet_5_224 coatnet_bn_0_rw_224 coatnet_nano_cc_224 coatnet_nano_rw_224
coatnet_pico_rw_224 coatnet_rmlp_0_rw_224 coatnet_rmlp_1_rw2_224 coatnet_rmlp_1_rw_224 coatnet_rmlp_2_rw_224
coatnet_rmlp_2_rw_384 coatnet_rmlp_3_rw_224 coatnet_rmlp_nano_rw_224 coatnext_nano_rw_224 test_coatnet
"""

VIT_PAPER, COAT_PAPER, MAX_PAPER = "arXiv 2010.11929", "arXiv 2106.04803", "arXiv 2204.01697"
# timm's module, or a kin in it: the builder's file and function, paper, summary, names.
FAMILIES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "vision_transformer": ("vit", VIT_PAPER, "Vision transformer: tokens are patches", tuple(VIT.split())),
    "deit": ("vit", "arXiv 2012.12877", "DeiT: a ViT trained on ImageNet alone", tuple(DEIT.split())),
    "vision_transformer_hybrid": (
        "vit", VIT_PAPER, "ViT on the features of a small convolutional net", tuple(HYBRID.split()),
    ),
    "vision_transformer_relpos": (
        "vit", VIT_PAPER, "ViT with a learned bias of relative positions", tuple(RELPOS.split()),
    ),
    "swin_transformer": (
        "swin", "arXiv 2103.14030", "Swin: attention in shifted windows, four stages", tuple(SWIN.split()),
    ),
    "swin_transformer_v2": (
        "swin", "arXiv 2111.09883", "Swin V2: cosine attention, resizable windows", tuple(SWIN_V2.split()),
    ),
    "swin_transformer_v2_cr": (
        "swin", "arXiv 2111.09883", "Swin V2 with a bias of log coordinates", tuple(SWIN_V2_CR.split()),
    ),
    "maxvit": (
        "maxvit", MAX_PAPER, "MaxViT: convolutions, attention in windows and in grids", tuple(MAXVIT.split()),
    ),
    "coatnet": (
        "maxvit", COAT_PAPER, "CoAtNet: two stages of convolutions, two of attention", tuple(COATNET.split()),
    ),
}  # fmt: skip


def _of_timm() -> tuple[Entry, ...]:
    """The rows of timm's architectures."""
    return tuple(
        Entry(
            name=name,
            domain="vision",
            task="classification",
            builder=f"manyheads.vision.models.{builder}:{builder}",
            paper=paper,
            licence="Apache-2.0",
            summary=summary,
            variant=name,
        )
        for builder, paper, summary, names in FAMILIES.values()
        for name in names
    )


VIM: dict[str, str] = {
    "vim_tiny_patch16_224": "Vim-tiny: scans over patches from both ends, 7.1 million parameters",
    "vim_tiny_patch16_stride8_224": "Vim-tiny on overlapping patches: four times the tokens",
    "vim_small_patch16_224": "Vim-small: 25.8 million parameters",
    "vim_small_patch16_stride8_224": "Vim-small on overlapping patches",
    "vim_base_patch16_224": "Vim-base: 97.6 million parameters",
    "vim": "Vision Mamba of any size: bidirectional state space scans over patches",
}
CCT: dict[str, str] = {
    "cct_2_3x2_32": "CCT-2/3x2 for images of 32: 0.28 million parameters",
    "cct_4_3x2_32": "CCT-4/3x2 for images of 32: 0.48 million parameters",
    "cct_6_3x1_32": "CCT-6/3x1 for images of 32: 3.2 million parameters",
    "cct_7_3x1_32": "CCT-7/3x1 for images of 32: 3.8 million parameters",
    "cct_7_3x2_32": "CCT-7/3x2 for images of 32: 3.9 million parameters",
    "cct_14_7x2_224": "CCT-14/7x2 for images of 224: 22.4 million parameters",
    "cct_14_7x2_384": "CCT-14/7x2 for images of 384: 22.5 million parameters",
    "cct": "Compact convolutional transformer of any size, for small data",
}


def _of_ours(rows: dict[str, str], module: str, paper: str) -> tuple[Entry, ...]:
    """The rows of models that are built here; each has a builder of its name."""
    return tuple(
        Entry(
            name=name,
            domain="vision",
            task="classification",
            builder=f"manyheads.vision.models.{module}:{name}",
            paper=paper,
            licence="Apache-2.0",
            summary=summary,
        )
        for name, summary in rows.items()
    )


MODELS: tuple[Entry, ...] = (
    *_of_timm(),
    *_of_ours(VIM, "vim", "arXiv 2401.09417"),
    *_of_ours(CCT, "cct", "arXiv 2104.05704"),
)
