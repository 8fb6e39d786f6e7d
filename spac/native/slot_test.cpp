#include "testing.h"

#include <cstdlib>

using namespace spac;
using namespace spac::testing;

TEST_CASE("pages are the kernel's, or as large as a test wants them") {
    const char * wanted = std::getenv("SPAC_PAGE_BYTES");
    CHECK(page_size() == (wanted ? std::max(kernel_page_size(), (size_t) std::atol(wanted)) : kernel_page_size()));
}

TEST_CASE("a tensor's slots hold the slice that touches most pages, wherever the first one begins") {
    const size_t page = page_size();
    const auto   most = [&](size_t slice_bytes, uint64_t offset, int n_experts) {
        PagedTensor tensor;
        tensor.slice_bytes = slice_bytes;
        tensor.offset      = offset;
        tensor.n_experts   = n_experts;
        return tensor.most_page_bytes() / page;
    };
    CHECK(most(2 * page, 5 * page, 3) == 2);
    CHECK(most(2 * page, 5 * page + 32, 3) == 3);
    CHECK(most(page / 2, 5 * page, 8) == 1);
    CHECK(most(page / 2, 5 * page + 32, 8) == 2);      // every second one
    CHECK(most(3 * page + 96, 4 * page, 1) == 4);
    CHECK(most(3 * page - page / 2, 4 * page, 1) == 3);
    CHECK(most(3 * page - page / 4, 4 * page, 4) == 4);  // the second one
    CHECK(most(1, 4 * page - 1, 1) == 1);
}

TEST_CASE("slices of one size share slots, whatever tensor they are of") {
    TestModel m(Shape{ 2, 2, 4, 2 * page_size() + 96, 4128 });
    for (const auto & tensor : m.model->tensors) {
        CHECK(tensor->slots == m.tensor(0, 0).slots);
        CHECK(tensor->slot_bytes >= tensor->most_page_bytes());
    }
    CHECK(m.model->expert_page_bytes == 16 * m.tensor(0, 0).slot_bytes);
    TestModel mapped(Shape{ 2, 2, 4, 2 * page_size() + 96, 4128, SPAC_STORE_MMAP });
    for (const auto & tensor : mapped.model->tensors) {
        CHECK(tensor->slots == nullptr);
        CHECK(mapped.intact(*tensor, 3));
    }
}

TEST_CASE("a slot comes without pages and goes with them; with huge pages, too, it costs what it holds") {
    const size_t page = page_size();
    for (const size_t slot_bytes : { page, 3 * page, ((size_t) 5 << 20) + page }) {
        CAPTURE(slot_bytes);
        SlotPool pool(slot_bytes, 4);
        std::vector<uint8_t *> slots;
        for (int i = 0; i < 4; ++i) {
            slots.push_back(pool.take());
            CHECK((uintptr_t) slots.back() % page == 0);
            CHECK(std::count(slots.begin(), slots.end(), slots.back()) == 1);
        }
        CHECK(bytes_in_memory(pool.begin(), pool.size()) == 0);
        for (int n : { 1, 2, 3, 4 }) {
            std::memset(slots[n - 1], 1, slot_bytes);
            CHECK(bytes_in_memory(pool.begin(), pool.size()) == n * slot_bytes);
        }
        for (int n : { 3, 2 }) {
            pool.give_back(slots[n]);
            CHECK(bytes_in_memory(pool.begin(), pool.size()) == n * slot_bytes);
        }
        CHECK(pool.take() == slots[2]);
        CHECK(pool.take() == slots[3]);
        CHECK(bytes_in_memory(pool.begin(), pool.size()) == 2 * slot_bytes);
    }
}

TEST_CASE("slots for which there is no address space are refused in words") {
    CHECK_THROWS_WITH_AS(SlotPool((size_t) 1 << 46, 4), doctest::Contains("bytes of address space for the experts"), std::runtime_error);
}
