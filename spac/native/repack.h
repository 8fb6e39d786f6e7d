// Repacked weights: the rows of an expert interleaved, for upstream kernels that are up to three times as fast.
//
// Which layout a tensor gets on this CPU, how it is made and the kernel that multiplies it all come from upstream's own repack
// buffer type, so that results are bit for bit those of a model that upstream repacked while loading.
#pragma once

#include "store.h"

#include "ggml-backend.h"

#include <cstddef>
#include <cstdint>
#include <memory>

namespace spac {

// Upstream's repack buffer type among a CPU device's; null: it has none.
ggml_backend_buffer_type_t repack_buffer_type(ggml_backend_dev_t cpu);

class Repacker : public Arrangement {
  public:
    // Looks for upstream's repack buffer type among the CPU device's; without it nothing is repacked.
    static void find(ggml_backend_dev_t cpu);
    // null: upstream multiplies these weights as they are.
    static std::unique_ptr<Repacker> make(const ggml_tensor & weights);

    // ggml::cpu::tensor_traits, for tensor->extra
    void * traits() const { return traits_; }
    size_t unit_bytes() const override;
    void   put(void * to, const void * from, size_t length) const override;

  private:
    ggml_type type_       = GGML_TYPE_COUNT;
    int64_t   n_columns_  = 0;
    int64_t   group_rows_ = 0;
    void *    traits_     = nullptr;
};

}  // namespace spac
