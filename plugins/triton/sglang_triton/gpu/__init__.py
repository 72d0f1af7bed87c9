"""What sglang-cuda and sglang-rocm share: a runtime on the `torch.cuda` that both builds of PyTorch have."""
