# Writes build.json beside the libraries: what they were built for, which spac/host/build.py compares with the machine that it runs on.
#
# Upstream puts its instruction flags on the CPU backend only. The compiler itself is asked what they allow; names are those in
# /proc/cpuinfo. On x86 only what kernels have listed for long: a CPU must not be refused for the kernel's not naming a feature.
set(cpu_features
    __ARM_FEATURE_ATOMICS=atomics
    __ARM_FEATURE_QRDMX=asimdrdm
    __ARM_FEATURE_DOTPROD=asimddp
    __ARM_FEATURE_FP16_VECTOR_ARITHMETIC=asimdhp
    __ARM_FEATURE_SVE=sve
    __ARM_FEATURE_SVE2=sve2
    __ARM_FEATURE_MATMUL_INT8=i8mm
    __ARM_FEATURE_BF16_VECTOR_ARITHMETIC=bf16
    __SSE4_2__=sse4_2
    __AVX__=avx
    __F16C__=f16c
    __FMA__=fma
    __AVX2__=avx2
    __BMI2__=bmi2
    __AVX512F__=avx512f)

set(flags "")
if (TARGET ggml-cpu)  # else several, of which one that suits is picked at run time
    get_target_property(flags ggml-cpu COMPILE_OPTIONS)
    list(FILTER flags INCLUDE REGEX "^-m")
endif()
string(REPLACE " " ";" flags "${CMAKE_C_FLAGS};${flags}")
execute_process(COMMAND ${CMAKE_C_COMPILER} ${flags} -dM -E -x c /dev/null OUTPUT_VARIABLE macros COMMAND_ERROR_IS_FATAL ANY)

set(needs "")
foreach (pair ${cpu_features})
    string(REPLACE "=" ";" pair "${pair}")
    list(GET pair 0 macro)
    list(GET pair 1 feature)
    if (macros MATCHES "#define ${macro} ")
        list(APPEND needs "\"${feature}\"")
    endif()
endforeach()
list(JOIN needs ", " needs)
file(WRITE "${CMAKE_BINARY_DIR}/build.json"
    "{\"name\": \"${SPAC_BUILD}\", \"processor\": \"${CMAKE_SYSTEM_PROCESSOR}\", \"needs\": [${needs}]}\n")
install(FILES "${CMAKE_BINARY_DIR}/build.json" DESTINATION ${SPAC_LIB_DESTINATION} COMPONENT spac)
