"""Cards from outside of torch: NVML, device nodes, data sheets, and why torch cannot use one."""
