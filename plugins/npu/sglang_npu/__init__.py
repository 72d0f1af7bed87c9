"""sglang-core on Huawei Ascend NPUs."""
