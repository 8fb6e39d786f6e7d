# Jetson Orin (Cortex-A78AE).
set(SPAC_BUILD orin CACHE STRING "")
set(GGML_CPU_ARM_ARCH armv8.2-a+dotprod+fp16;-mtune=cortex-a78ae CACHE STRING "")
include("${CMAKE_CURRENT_LIST_DIR}/linux-aarch64.cmake")
