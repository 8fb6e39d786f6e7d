#include "repack.h"

#include "ggml-backend-impl.h"

#include <cstring>
#include <vector>

namespace spac {

static ggml_backend_buffer_t repack_buffer = nullptr;  // lends its functions only; never freed

// Layouts interleave 4, 8 or 16 rows, and stay within each such group: a multiple of the group at a time is repacked like the
// whole. Sixteen rows stay in the CPU's cache.
static constexpr int64_t max_group_rows = 16;

ggml_backend_buffer_type_t repack_buffer_type(ggml_backend_dev_t cpu) {
    auto get_bufts = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu),
                                                                                              "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * buft = get_bufts ? get_bufts(cpu) : nullptr; buft && *buft; ++buft) {
        if (std::strcmp(ggml_backend_buft_name(*buft), "CPU_REPACK") == 0) {
            return *buft;
        }
    }
    return nullptr;
}

void Repacker::find(ggml_backend_dev_t cpu) {
    ggml_backend_buffer_type_t buft = repack_buffer ? nullptr : repack_buffer_type(cpu);
    if (buft) {
        repack_buffer = ggml_backend_buft_alloc_buffer(buft, 64);
    }
}

std::unique_ptr<Repacker> Repacker::make(const ggml_tensor & weights) {
    if (!repack_buffer || ggml_n_dims(&weights) != 3) {  // as upstream's own condition for MUL_MAT_ID
        return nullptr;
    }
    ggml_tensor probe = weights;
    probe.extra       = nullptr;
    repack_buffer->iface.init_tensor(repack_buffer, &probe);
    if (!probe.extra) {
        return nullptr;
    }
    auto repacker         = std::make_unique<Repacker>();
    repacker->type_       = weights.type;
    repacker->n_columns_  = weights.ne[0];
    repacker->group_rows_ = 1;
    while (repacker->group_rows_ < max_group_rows && weights.ne[1] % (2 * repacker->group_rows_) == 0) {
        repacker->group_rows_ *= 2;
    }
    repacker->traits_ = probe.extra;
    return repacker;
}

size_t Repacker::unit_bytes() const {
    return (size_t) group_rows_ * ggml_row_size(type_, n_columns_);
}

void Repacker::put(void * to, const void * from, size_t length) const {
    thread_local std::vector<uint8_t> rows;
    const size_t group_bytes = unit_bytes();

    ggml_tensor piece{};
    piece.type   = type_;
    piece.ne[0]  = n_columns_;
    piece.ne[1]  = group_rows_;
    piece.ne[2]  = piece.ne[3] = 1;
    piece.nb[0]  = ggml_type_size(type_);
    piece.nb[1]  = ggml_row_size(type_, n_columns_);
    piece.nb[2]  = piece.nb[3] = group_bytes;
    piece.extra  = traits_;
    piece.buffer = repack_buffer;
    for (size_t at = 0; at < length; at += group_bytes) {
        const void * group = (const uint8_t *) from + at;
        piece.data         = (uint8_t *) to + at;
        if (from == to) {
            rows.resize(group_bytes);
            std::memcpy(rows.data(), group, group_bytes);
            group = rows.data();
        }
        repack_buffer->iface.set_tensor(repack_buffer, &piece, group, 0, group_bytes);
    }
}

}  // namespace spac
