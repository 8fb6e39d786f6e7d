# Any 64-bit ARM: the CPU backend as several modules, from armv8-a to armv9.2-a, of which the best that runs is loaded.
set(SPAC_BUILD portable CACHE STRING "")
set(GGML_BACKEND_DL ON CACHE BOOL "")
set(GGML_CPU_ALL_VARIANTS ON CACHE BOOL "")
include("${CMAKE_CURRENT_LIST_DIR}/linux-aarch64.cmake")
