"""The class lists of published victims, in the order of their logits."""

from extraction.data.folders import normalise_class
from extraction.victims.classes import KNOWN_CLASSES


def test_the_class_lists_of_kinetics():
    k400, k600 = (KNOWN_CLASSES[name]() for name in ("k400", "k600"))
    assert (len(k400), len(k600)) == (400, 600)
    assert k600 == sorted(k600)
    assert len({normalise_class(name) for name in k600}) == 600
    # Where others have them: class indices published with I3D and MoViNet.
    assert [k600[k] for k in (0, 17, 236, 307, 427, 599)] == [
        "abseiling", "backflip (human)", "jogging", "parkour", "running on treadmill", "zumba",
    ]  # fmt: skip
