"""Read facts about NVIDIA GPUs without torch: NVML, device nodes, data sheets, and why torch cannot use a GPU."""
