"""The whole job: files, devices, statistics and plans joined."""

from hswq.driver.batch import Outcome, quantize_checkpoints
from hswq.driver.bench import bench_files
from hswq.driver.calibrate import calibrate_checkpoint
from hswq.driver.check import Check, check_file
from hswq.driver.compare import compare_files
from hswq.driver.convert import ConvertReport, convert_checkpoint, dequantize_checkpoint
from hswq.driver.inspect import inspect_path
from hswq.driver.quantize import plan_checkpoint, quantize_checkpoint
from hswq.driver.report import Report

__all__ = [
    "Check",
    "ConvertReport",
    "Outcome",
    "Report",
    "bench_files",
    "calibrate_checkpoint",
    "check_file",
    "compare_files",
    "convert_checkpoint",
    "dequantize_checkpoint",
    "inspect_path",
    "plan_checkpoint",
    "quantize_checkpoint",
    "quantize_checkpoints",
]
