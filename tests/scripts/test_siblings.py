"""A MoViNet script is a copy of its Swin sibling, but for its constants."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLACK_BOX = ("conditional_gan_with", "stacked_images_with", "biggan_with")
STAGES = ("auxiliary", "finetune", "ticket")
SIBLINGS = [
    ("grey_box/swin_to_r21_kd.py", "grey_box/movinet_to_r21.py"),
    *((f"grey_box/swin_to_vit_{stage}.py", f"grey_box/movinet_to_r50_{stage}.py") for stage in STAGES),
    ("black_box/attack_video_swin.py", "black_box/attack_video_movinet.py"),
    *((f"black_box/{name}_swin.py", f"black_box/{name}_movinet.py") for name in BLACK_BOX),
]


@pytest.mark.parametrize(("swin", "movinet"), SIBLINGS)
def test_the_movinet_scripts_are_their_siblings_but_for_constants(swin, movinet):
    def blank(path: str) -> str:
        tree = ast.parse((ROOT / path).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant):
                node.value = 0
        return ast.dump(tree)

    assert blank(swin) == blank(movinet)
