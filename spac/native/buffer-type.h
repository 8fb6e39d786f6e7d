// The glue to ggml: a buffer type whose tensors are paged, and the callbacks around the experts of MUL_MAT_ID.
#pragma once

#include "ggml-backend.h"

struct spac_context;

namespace spac {

// Registers with the CPU backend, once; SPAC_OK or SPAC_E_BACKEND.
int register_buffer_type();

// null before it is registered
ggml_backend_buffer_type_t buffer_type();

// The context whose graph the calling thread is computing: noted by the abort callback, which llama.cpp polls on that thread.
void set_current_context(spac_context * context);

}  // namespace spac
