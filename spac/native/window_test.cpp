#include "testing.h"

#include <cstdlib>
#include <random>
#include <set>

using namespace spac;
using namespace spac::testing;

// Never touched: only addresses count.
static uint8_t * const somewhere = (uint8_t *) (uintptr_t) (1024 * 65536);

static PagedTensor tensor_of(int n_experts, size_t slice_bytes, size_t misplaced) {
    PagedTensor tensor;
    tensor.n_experts   = n_experts;
    tensor.slice_bytes = slice_bytes;
    tensor.data        = somewhere + misplaced;
    tensor.slices      = std::make_unique<Slice[]>(n_experts);
    return tensor;
}

static std::set<uintptr_t> pages_of(const PagedTensor & tensor, int expert) {
    std::set<uintptr_t> pages;
    const uintptr_t begin = (uintptr_t) tensor.slice_data(expert), end = begin + tensor.slice_bytes;
    for (uintptr_t page = begin / page_size(); page * page_size() < end; ++page) {
        pages.insert(page);
    }
    return pages;
}

TEST_CASE("pages are the kernel's, or as large as a test wants them") {
    const char * wanted = std::getenv("SPAC_PAGE_BYTES");
    CHECK(page_size() == (wanted ? std::max(kernel_page_size(), (size_t) std::atol(wanted)) : kernel_page_size()));
}

TEST_CASE("a page on a boundary belongs to the slice whose neighbour is not present") {
    const size_t page = page_size();
    PagedTensor tensor = tensor_of(3, 2 * page, page / 2);  // every slice touches three pages
    uint8_t * address;
    size_t    length;

    tensor.own_pages(1, address, length);
    CHECK(address == somewhere + 2 * page);
    CHECK(length == 3 * page);

    tensor.slices[0].state = State::resident;
    tensor.own_pages(1, address, length);
    CHECK(address == somewhere + 3 * page);
    CHECK(length == 2 * page);

    tensor.slices[2].state = State::reading;  // reads in flight count
    tensor.own_pages(1, address, length);
    CHECK(address == somewhere + 3 * page);
    CHECK(length == page);
    CHECK(tensor.page_bytes(1) == 3 * page);
}

TEST_CASE("a neighbour that is queued or failed keeps no page") {
    PagedTensor tensor = tensor_of(3, page_size(), page_size() / 2);
    tensor.slices[0].state = State::queued;
    tensor.slices[2].state = State::failed;
    CHECK(tensor.own_page_bytes(1) == 2 * page_size());
}

TEST_CASE("a slice inside a page costs nothing while another slice on that page is present") {
    PagedTensor tensor = tensor_of(16, page_size() / 8, 0);
    CHECK(tensor.own_page_bytes(1) == page_size());
    tensor.slices[7].state = State::resident;
    CHECK(tensor.own_page_bytes(1) == 0);
    CHECK(tensor.own_page_bytes(8) == page_size());
    tensor.slices[7].state = State::absent;
    CHECK(tensor.own_page_bytes(1) == page_size());
}

TEST_CASE("whatever comes and goes, own pages add up to the pages that present slices touch") {
    const size_t page = page_size();
    std::mt19937 random(2);
    for (size_t slice_bytes : { (size_t) 32, page / 3, page - 1, page, page + 1, page + page / 2, 2 * page, 5 * page / 2 + 32 }) {
        for (size_t misplaced : { (size_t) 0, (size_t) 32, page / 2, page - 32 }) {
            CAPTURE(slice_bytes);
            CAPTURE(misplaced);
            PagedTensor tensor = tensor_of(40, slice_bytes, misplaced);
            size_t used = 0;
            bool   good = true;
            for (int step = 0; step < 300; ++step) {
                const int e = (int) (random() % 40);
                std::set<uintptr_t> others, mine;
                for (int other = 0; other < 40; ++other) {
                    if (other != e && tensor.present(other)) {
                        others.merge(pages_of(tensor, other));
                    }
                }
                for (uintptr_t p : pages_of(tensor, e)) {
                    if (others.count(p) == 0) {
                        mine.insert(p);
                    }
                }
                uint8_t * address;
                size_t    length;
                tensor.own_pages(e, address, length);
                good = good && length == mine.size() * page && (length == 0 || *mine.begin() * page == (uintptr_t) address);
                used += tensor.present(e) ? -length : length;
                tensor.slices[e].state = tensor.present(e) ? State::absent : State::resident;
                const size_t now = others.size() + (tensor.present(e) ? mine.size() : 0);
                good = good && used == now * page;
            }
            CHECK(good);
        }
    }
}

TEST_CASE("with huge pages, too, a slice's pages come and go with it") {
    const size_t slice_bytes = (5 << 20) + 1000, misplaced = 300, n_experts = 4;
    Window window(n_experts * slice_bytes, misplaced);
    REQUIRE(mprotect(window.pages, window.n_bytes, PROT_READ | PROT_WRITE) == 0);
    madvise(window.pages, window.n_bytes, MADV_NOHUGEPAGE);
    PagedTensor tensor = tensor_of(n_experts, slice_bytes, 0);
    tensor.data        = window.data;
    const bool huge = tensor.use_huge_pages(n_experts) > 0;
    CHECK(tensor.use_huge_pages(0) == 0);
    CHECK(tensor.use_huge_pages(2) == (huge ? 2 : 0));  // no more mappings than are left
    std::mt19937 random(1);
    size_t used = 0;
    for (int step = 0; step < 60; ++step) {
        const int e = (int) (random() % n_experts);
        uint8_t * address;
        size_t    length;
        if (tensor.present(e)) {
            tensor.slices[e].state = State::absent;
            tensor.own_pages(e, address, length);
            madvise(address, length, MADV_DONTNEED);
            used -= length;
        } else {
            tensor.own_pages(e, address, length);
            tensor.slices[e].state = State::resident;
            std::memset(tensor.slice_data(e), 1, slice_bytes);
            used += length;
        }
        CHECK(bytes_in_memory(window) == used);
    }
}
