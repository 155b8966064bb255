"""A SavedModel of TensorFlow Hub as a victim: its own answers, and one line for what is none."""

import sys
from pathlib import Path

import pytest
import torch

from extraction.errors import BudgetExhausted
from extraction.victims.zoo import load_victim


def test_without_tensorflow_one_line_says_what_to_do(load_error, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert "pip install -e '.[tensorflow]', or take movinet_a2_k600" in load_error("movinet_a2_k600_tfhub", tmp_path)


@pytest.fixture(scope="module")
def tensorflow():
    pytest.importorskip("tensorflow_hub", reason="tensorflow-hub is not installed: pip install -e '.[tensorflow]'")
    return pytest.importorskip("tensorflow", reason="tensorflow is not installed: pip install -e '.[tensorflow]'")


@pytest.fixture(scope="module")
def saved_model(tensorflow, tmp_path_factory) -> Path:
    """A folder with the published signature: {'image': (B, T, H, W, 3)} -> (B, 600), and a kernel that tells axes apart."""
    tf = tensorflow

    class Model(tf.Module):
        def __init__(self):
            self.kernel = tf.Variable(tf.random.stateless_normal((3, 600), (1, 2)))

        @tf.function(input_signature=[{"image": tf.TensorSpec((None, None, None, None, 3), tf.float32)}])
        def __call__(self, inputs):
            image = inputs["image"]
            weights = [tf.range(1.0, 1.0 + tf.cast(tf.shape(image)[k], tf.float32)) for k in (1, 2, 3)]
            for weight in weights:  # time, height, width
                image = tf.einsum("bt...,t->b...", image, weight / tf.reduce_sum(weight))
            return image @ self.kernel

    folder = tmp_path_factory.mktemp("tfhub") / "movinet"
    tf.saved_model.save(Model(), str(folder))
    return folder


def test_tfhub_answers_as_tensorflow_called_directly(random_clips, tensorflow, saved_model):
    clips = random_clips(2, 3, 50, 224, 224)
    direct = tensorflow.saved_model.load(str(saved_model))({"image": clips.permute(0, 2, 3, 4, 1).numpy()})
    victim = load_victim("movinet_a2_k600_tfhub", saved_model, "logits", query_budget=3)
    torch.testing.assert_close(victim.query(clips), torch.tensor(direct.numpy()), atol=0, rtol=0)
    assert (victim.num_queries, victim.num_classes, len(victim.fingerprint)) == (2, 600, 16)
    with pytest.raises(BudgetExhausted):
        victim.query(clips)
    assert victim.num_queries == 2
    assert tensorflow.config.get_visible_devices("GPU") == []


def test_other_saved_models_get_one_line(load_error, tensorflow, tmp_path):
    tf = tensorflow
    assert "holds no saved_model.pb" in load_error("movinet_a2_k600_tfhub", tmp_path)
    plain = tf.Module()
    tf.saved_model.save(plain, str(tmp_path / "plain"))
    assert "not a SavedModel that takes" in load_error("movinet_a2_k600_tfhub", tmp_path / "plain")
    few = tf.Module()
    few.__call__ = tf.function(
        lambda inputs: tf.reduce_mean(inputs["image"], [1, 2, 3]),
        input_signature=[{"image": tf.TensorSpec((None, None, None, None, 3), tf.float32)}],
    )
    tf.saved_model.save(few, str(tmp_path / "few"))
    assert "answers (1, 3) to one clip instead of (1, 600)" in load_error("movinet_a2_k600_tfhub", tmp_path / "few")
