# Raspberry Pi 5 (Cortex-A76).
set(SPAC_BUILD pi5 CACHE STRING "")
set(GGML_CPU_ARM_ARCH armv8.2-a+dotprod+fp16;-mtune=cortex-a76 CACHE STRING "")
include("${CMAKE_CURRENT_LIST_DIR}/linux-aarch64.cmake")
