"""Block by block: what the whole model does in memory, to the bit, and whoever kills it."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import w8a8
from tests import families
from tests.blockwise.conftest import data, saved
from tests.conftest import contents, crossed, every_third, gpt2, llama, named, opt, qwen3_moe
from tests.streaming.conftest import partial_of, tensors
from w8a8.blockwise import calibrated
from w8a8.blockwise.activations import Recorder
from w8a8.calibration.data import Calibration
from w8a8.checkpoint.opening import open_model
from w8a8.directories import quantize_directory
from w8a8.errors import CheckpointError, NonFiniteError
from w8a8.records.streaming import Prediction


def in_memory(source, target, scheme, **options):
    model = open_model(source).model
    result = w8a8.quantize(model, scheme, **options)
    w8a8.save(model, target)
    return result, tensors(target)


def lost(result):
    """The SQNR of each quantised weight, by layer."""
    return {m.name: m.weight_sqnr_db for m in result.coverage.quantized}


def assert_equal(found, wanted):
    assert set(found) == set(wanted)
    unequal = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert unequal == []
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in wanted.items()}


def gemma3():
    return families.build("gemma3")


def stacked_mixtral():
    return families.build("mixtral")


@crossed("make dtype", [llama, opt, gpt2, gemma3], [torch.float32, torch.bfloat16], ids=named)
def test_static_scales_are_those_of_the_model_in_memory(tmp_path, make, dtype):
    source = saved(make(), tmp_path / "source", dtype)
    done = quantize_directory(source, tmp_path / "streamed", "w8a8-static", calibration=data(), smooth="none")
    result, wanted = in_memory(source, tmp_path / "memory", "w8a8-static", calibration=data(), smooth="none")
    assert_equal(tensors(tmp_path / "streamed"), wanted)
    assert done.smooth is None
    assert [(m.name, m.scheme, m.macs) for m in done.coverage.modules] == [
        (m.name, m.scheme, m.macs) for m in result.coverage.modules
    ]


@crossed("make scheme", [llama, opt], ["w8a8", "w8a8-static", "w8a8-o3", "w8a16"], ids=named)
def test_a_fixed_alpha_gives_the_weights_of_the_model_in_memory(tmp_path, make, scheme):
    source = saved(make(), tmp_path / "source")
    done = quantize_directory(source, tmp_path / "streamed", scheme, calibration=data(), smooth=0.5)
    result, wanted = in_memory(source, tmp_path / "memory", scheme, calibration=data(), smooth=0.5)
    assert_equal(tensors(tmp_path / "streamed"), wanted)
    assert lost(done) == pytest.approx(lost(result), rel=1e-9)
    unsmoothed = w8a8.quantize(open_model(source).model, scheme, calibration=data(), smooth="none")
    assert lost(done) != pytest.approx(lost(unsmoothed), rel=1e-9)  # it is of the smoothed weights
    assert len(done.smooth.smoothed) == len(result.smooth.smoothed) > 0
    assert {g.source for g in done.smooth.smoothed} == {g.source for g in result.smooth.smoothed}


def test_in_inference_mode_the_bytes_are_the_same(tmp_path):
    source = saved(opt(), tmp_path / "source")
    options = {"calibration": data(), "smooth": 0.5}
    quantize_directory(source, tmp_path / "usual", "w8a8-static", **options)
    with torch.inference_mode():
        quantize_directory(source, tmp_path / "inside", "w8a8-static", **options)
    assert contents(tmp_path / "inside") == contents(tmp_path / "usual")


@crossed("smooth scheme split", [0.5, "none", "searched"], ["w8a8", "w8a8-static"], [True, False], ids=named)
def test_experts_become_what_they_become_in_memory(tmp_path, split, scheme, smooth):
    if (scheme, smooth) == ("w8a8", "none"):
        pytest.skip("does not use calibration data")
    source = saved(qwen3_moe(), tmp_path / "source", split=split)
    options = {"calibration": data(), "smooth": smooth}
    done = quantize_directory(source, tmp_path / "streamed", scheme, **options)
    result, wanted = in_memory(source, tmp_path / "memory", scheme, **options)
    assert_equal(tensors(tmp_path / "streamed"), wanted)
    assert lost(done) == pytest.approx(lost(result), rel=1e-9)
    assert sum(".experts." in name for name in result.schemes) == 2 * 4 * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
@pytest.mark.parametrize("make", every_third([stacked_mixtral, llama, opt]), ids=named)
def test_a_searched_alpha_gives_the_weights_of_the_model_in_memory(tmp_path, make, dtype):
    source = saved(make(), tmp_path / "source", dtype)
    done = quantize_directory(source, tmp_path / "streamed", "w8a8-static", calibration=data())
    _, wanted = in_memory(source, tmp_path / "memory", "w8a8-static", calibration=data(), smooth="searched")
    assert_equal(tensors(tmp_path / "streamed"), wanted)
    assert done.smooth.alpha == "searched"


def test_other_observers_and_int8_heads_are_as_in_memory(tmp_path):
    source = saved(opt(), tmp_path / "source")
    options = {"calibration": data(), "observer": "mse", "smooth": "none", "head": "int8"}
    done = quantize_directory(source, tmp_path / "streamed", "w8a8-static", **options)
    _, wanted = in_memory(source, tmp_path / "memory", "w8a8-static", **options)
    assert_equal(tensors(tmp_path / "streamed"), wanted)
    assert set(done.untied) == {"lm_head"}


def test_tokens_that_the_mask_hides_do_not_count(tmp_path):
    source = saved(llama(), tmp_path / "source")
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    calibration = Calibration.of([{"input_ids": ids, "attention_mask": mask}])
    quantize_directory(source, tmp_path / "streamed", "w8a8-static", calibration=calibration, smooth="none")
    _, wanted = in_memory(source, tmp_path / "memory", "w8a8-static", calibration=calibration, smooth="none")
    assert_equal(tensors(tmp_path / "streamed"), wanted)


def test_tokens_that_the_mask_hides_are_sent_to_no_expert(tmp_path):
    source = saved(qwen3_moe(), tmp_path / "source")
    ids = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    masked = Calibration.of([{"input_ids": ids, "attention_mask": mask}])
    cut = Calibration.of([{"input_ids": ids[:1]}, {"input_ids": ids[1:2, :7]}, {"input_ids": ids[2:]}])
    options = {"smooth": "none"}
    quantize_directory(source, tmp_path / "streamed", "w8a8-static", calibration=masked, **options)
    _, wanted = in_memory(source, tmp_path / "memory", "w8a8-static", calibration=masked, **options)
    assert_equal(tensors(tmp_path / "streamed"), wanted)
    _, alone = in_memory(source, tmp_path / "cut", "w8a8-static", calibration=cut, **options)
    scales = [name for name in wanted if ".experts." in name and name.endswith("input_scale")]
    assert len(scales) == 2 * 4 * 3
    for name in scales:
        assert torch.allclose(wanted[name], alone[name], rtol=1e-5)


def test_a_block_that_stays_float_passes_its_activations_on(tmp_path):
    source = saved(llama(num_hidden_layers=3), tmp_path / "source")
    options = {"calibration": data(), "smooth": 0.5, "exclude": ["model.layers.1.*"]}
    quantize_directory(source, tmp_path / "streamed", "w8a8-static", **options)
    _, wanted = in_memory(source, tmp_path / "memory", "w8a8-static", **options)
    assert_equal(tensors(tmp_path / "streamed"), wanted)


def test_the_result_loads_and_has_nothing_else_in_it(tmp_path):
    source = saved(llama(), tmp_path / "source")
    quantize_directory(source, tmp_path / "streamed", "w8a8-static", calibration=data())
    assert not partial_of(tmp_path / "streamed").exists()
    names = {path.name for path in (tmp_path / "streamed").iterdir()}
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors.index.json", *shards}
    model = w8a8.load(tmp_path / "streamed")
    with torch.no_grad():
        assert bool(torch.isfinite(model(**data().batches[0]).logits).all())
    assert all(layer.kernel_calls() for _, layer in w8a8.layers.linear.quant_linears(model))


class _Stopped(Exception):  # noqa: N818 - ends a job between two blocks
    pass


def stopped_after(blocks, source, target, **options):
    def stop(done, total, name):
        if done == blocks:
            raise _Stopped

    with pytest.raises(_Stopped):
        quantize_directory(source, target, "w8a8-static", calibration=data(), smooth=0.5, progress=stop, **options)
    assert not target.exists()


def resumed(source, target):
    made = []
    done = quantize_directory(
        source,
        target,
        "w8a8-static",
        calibration=data(),
        smooth=0.5,
        progress=lambda done, total, name: made.append(name),
    )
    return done, made


@pytest.fixture(scope="module")
def four_blocks(tmp_path_factory):
    """A model, and its result without a stop."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("four")
    source = saved(llama(num_hidden_layers=4), place / "source")
    resumed(source, place / "whole")
    return source, contents(place / "whole")


@pytest.mark.slow
def test_finished_blocks_are_not_made_again(tmp_path, four_blocks):
    source, whole = four_blocks
    target = tmp_path / "out"
    stopped_after(2, source, target)
    done, made = resumed(source, target)
    assert made == ["model.layers.2", "model.layers.3"]
    assert done.resumed == 2
    assert None not in lost(done).values()
    assert lost(done) == pytest.approx(lost(resumed(source, tmp_path / "at once")[0]), rel=1e-9)
    assert len(done.smooth.smoothed) == 4 * len([g for g in done.smooth.smoothed if "layers.0." in g.source])
    assert contents(target) == whole


def test_damaged_activations_are_made_again(tmp_path, four_blocks):
    source, whole = four_blocks
    target = tmp_path / "out"
    stopped_after(3, source, target)
    for path in partial_of(target).glob(".activations-*"):
        path.write_bytes(path.read_bytes()[:-4] + b"oops")
    _, made = resumed(source, target)
    assert len(made) == 4
    assert contents(target) == whole


def test_a_damaged_shard_is_made_again_from_the_start(tmp_path, four_blocks):
    source, whole = four_blocks
    target = tmp_path / "out"
    stopped_after(3, source, target)
    shard = partial_of(target) / "model-00002-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4] + b"oops")
    resumed(source, target)
    assert contents(target) == whole


def test_other_calibration_data_is_not_gone_on_with(tmp_path, four_blocks):
    source, _ = four_blocks
    stopped_after(1, source, tmp_path / "out")
    other = Calibration.of(torch.randint(3, 96, (6, 20)), samples=6, batch_size=2)
    with pytest.raises(CheckpointError, match=r"calibration: was 3 batches|calibration: was .*digest"):
        quantize_directory(source, tmp_path / "out", "w8a8-static", calibration=other, smooth=0.5)
    with pytest.raises(CheckpointError, match=r"smoothing: was 0.5, is searched"):
        quantize_directory(source, tmp_path / "out", "w8a8-static", calibration=data())


def test_where_one_record_cannot_be_begun_nothing_of_the_other_is_left(tmp_path, four_blocks, monkeypatch):
    def full(path, states):
        if path.name.endswith("folded.safetensors"):
            raise CheckpointError("the disk is full")
        return Recorder(path, states)

    monkeypatch.setattr(calibrated, "Recorder", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        resumed(four_blocks[0], tmp_path / "out")
    assert {path.name for path in partial_of(tmp_path / "out").iterdir()} == {"fingerprint.json", "lock-0"}


FILES = ("model-", ".activations-", ".smooth-", "journal-", "lock-", "fingerprint.json", "config.json", "generation_")
"""How the names of files begin that an unfinished result may hold."""

_KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from tests.blockwise.test_calibrated import resumed
source, target, lasts = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
draw, kills = random.Random(0), 0
while kills < 20:
    if target.exists():  # it was faster than the kill
        target.rename(target.with_name(f"whole-{kills}"))
    pid = os.fork()
    if not pid:
        signal.alarm(240)  # no child outlives a killer that was killed
        resumed(source, target)
        os._exit(0)
    time.sleep(draw.uniform(0, lasts / 2))
    os.kill(pid, signal.SIGKILL)
    kills += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
if not target.exists():
    resumed(source, target)
"""


@pytest.mark.slow
def test_a_job_that_is_killed_at_twenty_moments_gives_the_same_bytes(tmp_path, four_blocks):
    source, whole = four_blocks
    start = time.perf_counter()
    resumed(source, tmp_path / "whole-0")
    lasts = time.perf_counter() - start
    # one process imports, and forks before torch has threads: what is killed is the job, not the import of torch
    command = [sys.executable, "-c", _KILLER, str(source), str(tmp_path / "out"), str(lasts)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=250)
    for made in (tmp_path / "out", *tmp_path.glob("whole-*")):
        assert contents(made) == whole


@pytest.mark.slow
def test_wherever_the_disk_is_full_the_job_goes_on_from_there(small_disk, four_blocks, monkeypatch):
    """Room is made a little at a time, so that it is full again and again, at files of every kind."""
    source, whole = four_blocks
    monkeypatch.setattr(Prediction, "check", lambda self, target: None)  # as if the disk had filled up meanwhile
    target, ballast, full = small_disk / "out", small_disk / "ballast", []
    size = shutil.disk_usage(small_disk).free - 32_768
    ballast.write_bytes(bytes(size))
    while True:
        try:
            done, _ = resumed(source, target)
            break
        except CheckpointError as error:
            full.append(str(error))
        assert not target.exists()
        partial = partial_of(target)
        for path in partial.glob("*.safetensors"):  # every file is whole, and nothing else is there
            load_file(path)
        assert not [path.name for path in partial.iterdir() if not path.name.startswith(FILES)]
        size -= 32_768
        os.truncate(ballast, size)
    assert all("the disk is full; make room and run the same command again" in message for message in full)
    assert {".activations-", "model-"} <= {kind for kind in FILES if any(f"/{kind}" in message for message in full)}
    assert done.resumed >= 1
    assert contents(target) == whole


def test_a_dry_run_predicts_and_writes_nothing(tmp_path):
    source = saved(llama(), tmp_path / "source")
    done = quantize_directory(source, tmp_path / "out", "w8a8-static", calibration=data(), dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert done.prediction.output_bytes > sum(t.nbytes for t in tensors(source).values()) // 4
    assert done.prediction.seconds > 0


def test_too_little_disk_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    source = saved(llama(), tmp_path / "source")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(CheckpointError, match="make room"):
        quantize_directory(source, tmp_path / "out", "w8a8-static", calibration=data())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_nan_is_an_error_that_names_the_layer(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 5] = torch.nan
    source = saved(model, tmp_path / "source")
    with pytest.raises(NonFiniteError) as caught:
        quantize_directory(source, tmp_path / "out", "w8a8-static", calibration=data(), smooth="none")
    told = str(caught.value) + "".join(caught.value.__notes__)
    assert "model.layers.1.self_attn" in told


def test_smoothing_is_told_as_json_can_hold_it(tmp_path):
    source = saved(opt(), tmp_path / "source")
    done = quantize_directory(source, tmp_path / "out", "w8a8", calibration=data(), smooth=0.5)
    told = json.loads(json.dumps(done.smooth.to_dict()))
    assert all(group["source"].startswith("model.decoder.layers.") for group in told["groups"])
