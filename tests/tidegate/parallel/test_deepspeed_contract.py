"""What expert.py and engine.py assume of DeepSpeed's private parts, said one by one, so that an upgrade breaks here."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("deepspeed")

HINT = f"DeepSpeed {version('deepspeed')} changed its AutoEP contract; see platform/tidegate/parallel/expert.py: "


def test_the_engine_recognises_the_layer_by_its_class() -> None:
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.runtime.engine import DeepSpeedEngine

    from tidegate.parallel.expert import ExpertParallelMoE

    assert issubclass(ExpertParallelMoE, AutoEPMoELayer), HINT
    source = inspect.getsource(DeepSpeedEngine)
    assert "_AutoEPMoELayer" in source, HINT + "the engine no longer looks for AutoEPMoELayer"
    assert "set_deepspeed_parallelism(" in source, HINT + "the engine no longer asks layers to make their groups"
    assert list(inspect.signature(AutoEPMoELayer.set_deepspeed_parallelism).parameters) == [
        "self",
        "use_data_before_expert_parallel_",
        "folding_group_handles",
    ], HINT


def test_parameters_are_told_apart_by_their_tags() -> None:
    from deepspeed.moe.utils import is_moe_param

    weight = torch.nn.Parameter(torch.zeros(1))
    assert not is_moe_param(weight), HINT
    weight.allreduce = False  # type: ignore[attr-defined]
    assert is_moe_param(weight), HINT + "expert parameters are no longer marked by allreduce=False"


def test_the_cpu_backend_compiles_nothing_when_no_operator_is_compatible() -> None:
    from deepspeed.comm.torch import build_shm_op

    source = inspect.getsource(build_shm_op)
    assert "__compatible_ops__" in source, HINT + "engine.py keeps the CPU backend from compiling by that table"


def test_expert_checkpoints_hold_three_tensors_by_name() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    for function in (DeepSpeedEngine._get_non_moe_state_dict, DeepSpeedEngine._save_moe_checkpoint):
        assert "('w1', 'w2', 'w3')" in inspect.getsource(function), HINT + "model/moe.py keeps an unused w3 for it"


def test_bf16_training_at_zero_1_is_the_optimizer_whose_gradient_path_is_replaced() -> None:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.engine import DeepSpeedEngine

    from tidegate.parallel.flat_gradients import FlatGradients

    for name in ("step", "zero_grad", "backward_prologue", "backward_epilogue", "update_lp_params"):
        assert name in vars(BF16_Optimizer), HINT + f"BF16_Optimizer has no {name}"
    source = inspect.getsource(BF16_Optimizer)
    for name in (
        "bf16_groups",
        "real_dp_process_group",
        "fp32_groups_flat_partition",
        "fp32_groups_gradients",
        "fp32_groups_gradients_flat",
        "fp32_groups_gradient_flat_partition",
    ):
        assert f"self.{name} = " in source, HINT + f"BF16_Optimizer keeps no {name}; see flat_gradients.py"
    assert "reduce_gradients" in vars(FlatGradients)
    engine = inspect.getsource(DeepSpeedEngine)
    assert "self.optimizer.reduce_gradients(" in engine, HINT + "the engine no longer lets ZeRO 1 reduce for itself"


def test_checkpoints_go_through_one_door_and_are_looked_for_on_disk() -> None:
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
    from deepspeed.runtime.engine import DeepSpeedEngine

    from tidegate.parallel.snapshot import HostSnapshots

    assert set(CheckpointEngine.__abstractmethods__) <= set(vars(HostSnapshots)), HINT + "see snapshot.py"
    saving = inspect.getsource(DeepSpeedEngine.save_checkpoint)
    for part in ("self.checkpoint_engine.create", "self.checkpoint_engine.makedirs", "if save_latest and"):
        assert part in saving, HINT + f"save_checkpoint has no {part}; see snapshot.py"
    for function in (DeepSpeedEngine._save_moe_checkpoint, DeepSpeedEngine._save_checkpoint):
        source = inspect.getsource(function)
        assert "self.checkpoint_engine.save(" in source, HINT + f"{function.__name__} writes otherwise"
        assert "torch.save(" not in source, HINT + f"{function.__name__} writes otherwise"
    assert "self._copy_recovery_script(" in inspect.getsource(DeepSpeedEngine._save_zero_checkpoint), HINT
    for function in (DeepSpeedEngine._load_checkpoint, DeepSpeedEngine._load_zero_checkpoint):
        assert "torch.load(" not in inspect.getsource(function), HINT + f"{function.__name__} reads otherwise"


def test_universal_checkpoints_are_made_by_steps_that_can_be_called_one_by_one() -> None:
    from deepspeed.checkpoint import DeepSpeedCheckpoint, autoep_universal, ds_to_universal
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.tensor_fragment import map_to_flat_opt_states

    hint = HINT + "see parallel/reshape.py: "
    arguments = {
        ds_to_universal._inject_missing_state: ["ds_checkpoint"],
        ds_to_universal._aggregate_autoep_zero12_metadata: ["model_state_metadata"],
        ds_to_universal.extract_zero_shards: ["dir", "ds_checkpoint", "indices_3D"],
        map_to_flat_opt_states: ["flat_hp_tensor", "lp_tensors", "optim_state", "opt_keys"],
        ds_to_universal.merge_tp_slices: ["uc_info", "dir", "slice_dir", "tp_degree", "name_and_shapes"],
        autoep_universal.get_autoep_zero12_expert_param_info: ["autoep_layers_metadata"],
    }
    for function, names in arguments.items():
        assert list(inspect.signature(function).parameters) == names, hint + function.__name__
    assert "get_zero_files" in vars(DeepSpeedCheckpoint), hint + "get_zero_files"
    assert "_config.load_universal_checkpoint" in inspect.getsource(DeepSpeedEngine.load_universal_checkpoint), hint
    source = inspect.getsource(ZeROOptimizer.load_hp_checkpoint_state_from_checkpoint_dir)
    for line in (
        "if lp._hp_mapping is not None:",
        "self.optimizer.state[hp_param]['step'] = ",
        "map_to_flat_opt_states(hp_param, lp_groups[i], self.optimizer.state, opt_keys)",
    ):
        assert line in source, hint + "load_universal does otherwise what this function does"
    for optimizer in (BF16_Optimizer, DeepSpeedZeroOptimizer):
        source = inspect.getsource(optimizer.load_state_dict)
        assert "self._load_universal_checkpoint(checkpoint_folder, " in source, hint + optimizer.__name__
