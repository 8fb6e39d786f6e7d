# Any 64-bit ARM; tuned for Raspberry Pi 3 and 4 (Cortex-A53, A72).
set(SPAC_BUILD armv8 CACHE STRING "")
set(GGML_CPU_ARM_ARCH armv8-a;-mtune=cortex-a72 CACHE STRING "")
include("${CMAKE_CURRENT_LIST_DIR}/linux-aarch64.cmake")
