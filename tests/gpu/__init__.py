"""The same of CUDA: on a fake of torch.cuda whose clock is simulated, and, where there is a GPU, on the GPU itself."""
