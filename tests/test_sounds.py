"""Clips: the features of the reference extractor, every clip's rows at its own tokens, and broken files named."""

import json
from pathlib import Path

import corpus
import numpy as np
import pytest
import soundfile

from hetjax.data import DataConfig, ItemSpec, Loader, Pictures, Sounds, blank, inspect, sounds
from hetjax.data.problems import SampleError
from hetjax.run.experiment import Encoder
from models.whisper import Whisper

MODEL = Whisper(
    num_mels=80,
    width=16,
    num_layers=1,
    num_heads=2,
    mlp_width=16,
    output_width=16,
    variant="qwen2_audio",
    max_frames=80,
)
READER = Sounds(MODEL.num_mels, MODEL.frames, MODEL.context, MODEL.rows_of)
AUDIO = ItemSpec("audio", MODEL.rows, READER, slots_per_group=4, field="audio", placeholder="<audio>")
VISION = ItemSpec("vision", 4, Pictures(8, 8), slots_per_group=2)


def noise(samples: int, *, seed: int = 0, scale: float = 0.1) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=samples)).astype(np.float32)


def sweep(samples: int) -> np.ndarray:
    t = np.arange(samples) / sounds.RATE
    return (0.3 * np.sin(2 * np.pi * (200 + 300 * t) * t) + noise(samples, scale=0.01)).astype(np.float32)


CLIPS = {
    "noise": noise(32000),
    "not whole frames": noise(31999),
    "quiet": noise(12345, scale=1e-5),
    "sweep": sweep(50000),
    "one frame": noise(100),
    "silence": np.zeros(1600, np.float32),
    "30 s": noise(480000),
    "a little less than 30 s": sweep(479900),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_mels", [80, 128])
def test_features_are_those_of_the_reference_extractor(num_mels: int) -> None:
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=num_mels)
    made = extractor(list(CLIPS.values()), sampling_rate=16000, return_tensors="np", return_attention_mask=True)
    for name, mel, mask in zip(CLIPS, made["input_features"], made["attention_mask"], strict=True):
        got = sounds.log_mel(CLIPS[name], num_mels, 3000)
        samples = np.pad(CLIPS[name], (0, 480000 - len(CLIPS[name])))
        (precise,) = extractor._np_extract_fbank_features([samples], "cpu")
        np.testing.assert_allclose(got, precise.T, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(got, mel.T, atol=1e-4, err_msg=name)  # torch, where it is there: a float32 FFT
        assert mask.sum() == -(-len(CLIPS[name]) // 160)


def test_a_shorter_array_holds_the_first_frames_of_the_whole_context() -> None:
    for name in ("noise", "quiet", "one frame"):
        whole, first = (sounds.log_mel(CLIPS[name], 80, frames) for frames in (3000, 101))
        np.testing.assert_array_equal(first, whole[:101])


def test_a_tone_is_loudest_in_its_own_bin_and_the_rest_is_eight_decades_down() -> None:
    for pitch, wanted in ((440, 11), (1000, 26), (4000, 62)):  # Slaney's scale: 200/3 Hz a mel up to 1 kHz
        tone = np.sin(2 * np.pi * pitch * np.arange(16000) / 16000).astype(np.float32)
        mel = sounds.log_mel(tone, 80, 3000)
        assert abs(int(mel[50].argmax()) - wanted) <= 1, pitch
        np.testing.assert_allclose(mel.max() - mel[200:], 2)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
@pytest.mark.parametrize("rate", [16000, 44100, 8000])
def test_files_become_one_channel_at_16_khz(name: str, rate: int, tmp_path: Path) -> None:
    t = np.arange(rate) / rate
    left = 0.4 * np.sin(2 * np.pi * 440 * t)
    soundfile.write(tmp_path / name, np.stack([left, 0 * left], 1), rate)
    found = sounds.read_samples(tmp_path / name, 10**6)
    assert found.dtype == np.float32 and len(found) == 16000
    middle = slice(4000, 12000)
    wanted = 0.2 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(found[middle] - wanted[middle]).max() < (0.03 if name in ("a.ogg", "a.mp3") else 1e-3)
    cut = sounds.read_samples(tmp_path / name, 8000)
    np.testing.assert_allclose(cut, found[:8000], atol=1e-6)


def write(directory: Path, lengths: list[tuple[int, ...]]) -> str:
    """Sample n has clips of these lengths (frames), each of its own pitch, and a picture where n is odd."""
    entries = []
    for n, frames in enumerate(lengths):
        files = [f"{n}-{k}.wav" for k in range(len(frames))]
        for k, (name, length) in enumerate(zip(files, frames, strict=True)):
            soundfile.write(directory / name, tone(n, k, length), 16000, subtype="FLOAT")
        pictures = [f"vision-{n}.png"] if n % 2 else []
        for name in pictures:
            corpus.Image.new("RGB", (8, 8), corpus.colour(n, 0)).save(directory / name)
        marks = "<image>" * len(pictures) + "".join("so <audio>" for _ in files)
        turns = [{"from": "human", "value": f"{marks} q{n}"}, {"from": "gpt", "value": f"a{n}"}]
        entries.append({"id": f"id-{n}", "audio": files, "image": pictures, "conversations": turns})
    corpus.write_tokenizer(directory, len(lengths))
    (directory / "data.json").write_text(json.dumps(entries))
    return str(directory / "data.json")


def tone(sample: int, clip: int, frames: int) -> np.ndarray:
    t = np.arange(160 * frames) / 16000
    return (0.3 * np.sin(2 * np.pi * (300 + 50 * (8 * sample + clip)) * t)).astype(np.float32)


def test_every_clip_lies_at_its_own_tokens_beside_pictures(tmp_path: Path) -> None:
    lengths = [(80, 5), (40,), (), (3, 79, 17), (8,), (61, 4)]
    config = DataConfig(write(tmp_path, lengths), seq_len=64, samples_per_group=2, groups=2, pack=True, shuffle=False)
    seen = []
    with Loader(config, [VISION, AUDIO]) as loader:
        for batch, _ in loader.one_pass():
            for row, segment in zip(*np.nonzero(np.diff(batch["segment_ids"], prepend=0) > 0), strict=True):
                places = np.flatnonzero(batch["segment_ids"][row] == batch["segment_ids"][row, segment])
                words = [loader.tokenizer.id_to_token(t) for t in batch["tokens"][row, places]]
                n = int(next(word for word in words if word[0] == "q")[1:])
                seen.append(n)
                rows = [MODEL.rows_of(frames) for frames in lengths[n]]
                index = batch["audio.index"][row, places]
                wanted = [word for r in rows for word in ["so", *["<pad>"] * r]]
                assert words == ["<pad>"] * (4 * (n % 2)) + wanted + [f"q{n}", f"a{n}"]
                assert (batch["vision.index"][row, places] >= 0).sum() == 4 * (n % 2)
                clips = np.split(index[index >= 0], np.cumsum(rows)[:-1])
                for k, (clip, frames) in enumerate(zip(clips, lengths[n], strict=bool(rows))):
                    slot = int(clip[0]) // MODEL.rows
                    assert slot // AUDIO.slots_per_group == row // config.samples_per_group
                    assert clip.tolist() == [slot * MODEL.rows + r for r in range(MODEL.rows_of(frames))]
                    assert batch["audio.frames"][slot] == frames
                    np.testing.assert_array_equal(
                        batch["audio.mel"][slot], sounds.log_mel(tone(n, k, frames), 80, MODEL.frames)
                    )
        assert sorted(seen) == list(range(6))
        silent = blank(batch, [VISION, AUDIO])
        assert (silent["audio.mel"] == sounds.log_mel(np.zeros(160, np.float32), 80, 1)[0, 0]).all()
        np.testing.assert_array_equal(silent["audio.frames"], batch["audio.frames"])
        assert "audio slot" in inspect.describe(batch, loader.tokenizer, [VISION, AUDIO], groups=2)
        assert any("audio" in path.name for path in inspect.write_pictures(batch, [VISION, AUDIO], tmp_path / "out"))


def test_broken_missing_and_long_clips_are_counted_and_named(tmp_path: Path) -> None:
    path = write(tmp_path, [(40,), (40,), (80,), (90,), (1,), ()])
    (tmp_path / "0-0.wav").write_bytes(b"RIFF, but no sound")
    (tmp_path / "1-0.wav").unlink()
    reasons = {
        "id-0": "0-0.wav): cannot be read as a sound: ",
        "id-1": "1-0.wav): there is no such file",
        "id-4": "4-0.wav): it has 160 samples at 16000 Hz, too few for one row",
    }
    long = {"id-3": "3-0.wav): it is longer than 0.8 s and on_long_clip='skip'; raise max_frames or cut it"}
    for on_long, wanted in (("truncate", reasons), ("skip", reasons | long)):
        reader = Sounds(80, MODEL.frames, MODEL.context, MODEL.rows_of, on_long)
        item = ItemSpec("audio", MODEL.rows, reader, field="audio", placeholder="<audio>")
        config = DataConfig(path, seq_len=64, samples_per_group=1, shuffle=False)
        with Loader(config, [VISION, item]) as loader:
            batches = [batch for batch, _ in loader.one_pass()]
            assert {p.sample: p.reason for p in loader.bad}.keys() == wanted.keys()
            assert all(wanted[p.sample] in str(p) for p in loader.bad)
            assert [int(b["audio.frames"][0]) for b in batches] == ([80, 80, 0] if on_long == "truncate" else [80, 0])
    with pytest.raises(ValueError, match=r"on_long_clip='cut'; it must be one of truncate, skip"):
        Sounds(80, 1, 1, MODEL.rows_of, "cut")


@pytest.mark.parametrize("setting", [dict(pad_to_square=True), dict(resampling="bilinear")], ids=str)
def test_what_is_said_of_pictures_means_nothing_to_an_encoder_that_hears(setting: dict) -> None:
    with pytest.raises(ValueError, match=r"audio: \w+=.* means nothing to an encoder of clips; leave it out"):
        Encoder(MODEL, **setting).items  # noqa: B018


def test_a_clip_cut_at_its_context_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, [(80,), (90,), (200,)])
    with Loader(DataConfig(path, seq_len=64, samples_per_group=1, shuffle=False), [VISION, AUDIO]) as loader:
        assert len(list(loader.one_pass())) == 3 and not loader.bad
        assert loader.tally.cut_items == {1, 2} and "with a cut picture or clip: 2" in loader.tally.report()
    (said,) = (r.getMessage() for r in caplog.records)
    assert (
        said
        == f"sample 'id-1': its clip {tmp_path / '1-0.wav'} of 0.9 s is cut at 0.8 s; further ones are only counted"
    )


def test_rows_are_those_of_the_header_whatever_is_decoded(tmp_path: Path) -> None:
    for rate in (8000, 11025, 16000, 44100, 48000):
        for count in (rate // 3, rate // 3 + 1, 2 * rate + 7):
            for name in ("a.wav", "a.flac", "a.mp3", "a.ogg"):
                if rate == 11025 and name == "a.mp3":
                    continue
                soundfile.write(tmp_path / name, noise(count), rate)
                header = AUDIO.look(tmp_path / name)
                frames = int(AUDIO.read(tmp_path / name).values["frames"])
                wanted = min(-(-count * sounds.RATE // rate), MODEL.context * sounds.HOP)
                assert frames == -(-wanted // sounds.HOP) and header.rows == MODEL.rows_of(frames), (rate, count, name)


def test_a_file_cut_short_is_no_clip(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.mp3", noise(48000), 16000)
    content = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "b.mp3").write_bytes(content[: len(content) // 2])
    with pytest.raises(SampleError, match=r"it ends after \d+ samples of 48000"):
        sounds.read_samples(tmp_path / "b.mp3", 480000)
    soundfile.write(tmp_path / "d.wav", noise(48000), 16000)
    content = (tmp_path / "d.wav").read_bytes()
    (tmp_path / "e.wav").write_bytes(content[: len(content) // 2])
    with pytest.raises(SampleError, match=r"cannot be read as a sound: it ends after 47978 bytes .* of 96000"):
        sounds.read_samples(tmp_path / "e.wav", 8000)  # though it has as many
    length = content.index(b"data") + 4
    (tmp_path / "f.wav").write_bytes(content[:length] + b"\xff" * 4 + content[length + 4 :])  # written to a pipe
    f, d = (sounds.read_samples(tmp_path / name, 48000) for name in ("f.wav", "d.wav"))
    np.testing.assert_array_equal(f, d)
    soundfile.write(tmp_path / "c.wav", np.full(1600, np.nan), 16000, subtype="FLOAT")
    with pytest.raises(SampleError, match="not finite"):
        sounds.read_samples(tmp_path / "c.wav", 480000)


def test_a_context_beyond_30_s_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"context of 3002 frames; .* at most that"):
        Sounds(80, 3002, 3002, lambda frames: frames // 2)
