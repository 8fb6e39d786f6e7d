#include "include/spac.h"
#include "testing.h"

using namespace spac::testing;

// Time is not asserted, only that some was measured.

static spac_reads reads_of(const TempFile & temp, const std::vector<uint64_t> & offsets, const std::vector<uint64_t> & lengths, int store) {
    spac_reads test{};
    test.struct_size = sizeof test;
    test.path        = temp.path.c_str();
    test.offsets     = offsets.data();
    test.lengths     = lengths.data();
    test.n_reads     = (int64_t) offsets.size();
    test.depth       = 3;
    test.store       = store;
    return test;
}

// Products of four small experts.
static spac_products products_of(ggml_type type, int n_tokens, int n_ops) {
    spac_products test{};
    test.struct_size = sizeof test;
    test.type        = type;
    test.n_columns   = 256;
    test.n_rows      = 32;
    test.n_experts   = 4;
    test.n_tokens    = n_tokens;
    test.n_threads   = 2;
    test.n_ops       = n_ops;
    return test;
}

TEST_CASE("reads of whole blocks are timed with both stores, into all kinds of pages") {
    TempFile temp(1 << 20);
    const std::vector<uint64_t> offsets = { 0, 65536, 131072, 524288, 983040 }, lengths(5, 65536);
    for (int store : { SPAC_STORE_AUTO, SPAC_STORE_BUFFERED }) {
        for (int pages : { SPAC_PAGES_PAGER, SPAC_PAGES_HUGE, SPAC_PAGES_SMALL, SPAC_PAGES_TOUCHED }) {
            spac_reads test = reads_of(temp, offsets, lengths, store);
            test.pages      = pages;
            CAPTURE(spac_last_error());
            CHECK(spac_reads_measure(&test) == SPAC_OK);
            CHECK(test.seconds > 0);
        }
    }
}

TEST_CASE("stores are probed as they are, with a file that is there and holds something") {
    TempFile   temp(1 << 16);
    spac_probe probe{};
    probe.struct_size = sizeof probe;
    CHECK(spac_stores_probe(temp.path.c_str(), &probe) == SPAC_OK);
    CHECK(probe.page_bytes == spac::page_size());
    CHECK((probe.direct_align > 0) == (probe.direct_error == 0));
    spac::ModelFile file;
    file.path = temp.path;
    CHECK(spac::make_store(SPAC_STORE_DIRECT)->open(file) == probe.direct_error);
    CHECK(spac_stores_probe("/does/not/exist", &probe) == SPAC_E_IO);
    CHECK(spac_stores_probe(TempFile(0).path.c_str(), &probe) == SPAC_E_IO);
    CHECK(spac_stores_probe(nullptr, &probe) == SPAC_E_ARGUMENT);
    CHECK(spac_stores_probe(temp.path.c_str(), nullptr) == SPAC_E_ARGUMENT);
}

TEST_CASE("reads that cannot be are refused") {
    TempFile temp(1 << 16);
    const std::vector<uint64_t> offsets = { 4096 }, lengths = { 1 << 16 };
    spac_reads beyond = reads_of(temp, offsets, lengths, SPAC_STORE_AUTO);
    CHECK(spac_reads_measure(&beyond) == SPAC_E_ARGUMENT);
    const std::vector<uint64_t> whole = { 4096 };
    spac_reads missing = reads_of(temp, offsets, whole, SPAC_STORE_AUTO);
    missing.path       = "/does/not/exist";
    CHECK(spac_reads_measure(&missing) == SPAC_E_IO);
    spac_reads mapped = reads_of(temp, offsets, whole, SPAC_STORE_MMAP);
    CHECK(spac_reads_measure(&mapped) == SPAC_E_ARGUMENT);
    CHECK(spac_reads_measure(nullptr) == SPAC_E_ARGUMENT);
}

TEST_CASE("visits of a layer are timed with both stores, slices of any size") {
    TempFile temp(4 << 20);
    for (int store : { SPAC_STORE_AUTO, SPAC_STORE_BUFFERED }) {
        for (uint64_t slice_bytes : { 1000, 65536, 100000 }) {
            double      seconds[12] = {};
            spac_visits test{};
            test.struct_size  = sizeof test;
            test.path         = temp.path.c_str();
            test.slice_bytes  = slice_bytes;
            test.n_missing    = 4;
            test.n_visits     = 12;
            test.n_threads    = 2;
            test.n_io_threads = 3;
            test.store        = store;
            test.seconds      = seconds;
            CAPTURE(slice_bytes);
            CHECK(spac_visits_measure(&test) == SPAC_OK);
            CHECK(*std::min_element(seconds, seconds + 12) > 0);
            test.slice_bytes = 4 << 20;
            CHECK(spac_visits_measure(&test) == SPAC_E_ARGUMENT);
            test.n_threads = 0;
            CHECK(spac_visits_measure(&test) == SPAC_E_ARGUMENT);
        }
    }
    CHECK(spac_visits_measure(nullptr) == SPAC_E_ARGUMENT);
}

TEST_CASE("products are timed for types with and without another layout") {
    REQUIRE(spac_init() == SPAC_OK);  // the CPU backend may be a module
    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q6_K, GGML_TYPE_IQ2_XXS, GGML_TYPE_F16 }) {
        for (int n_tokens : { 1, 8 }) {
            spac_products test = products_of(type, n_tokens, 3);
            test.repack        = 1;
            CAPTURE(type);
            CHECK(spac_products_measure(&test) == SPAC_OK);
            CHECK(test.seconds > 0);
            CHECK((test.repack_s > 0) == (test.repacked != 0));
        }
    }
}

TEST_CASE("what computing loses for each byte that is read meanwhile") {
    REQUIRE(spac_init() == SPAC_OK);
    TempFile temp(1 << 20);
    const std::vector<uint64_t> offsets = { 0, 500000 }, lengths = { 100000, 200000 };
    spac_reads    reads = reads_of(temp, offsets, lengths, SPAC_STORE_AUTO);
    spac_products test  = products_of(GGML_TYPE_Q6_K, 1, 1);
    test.min_s        = 0.05;
    test.contention_s = -1;
    test.meanwhile    = &reads;
    CHECK(spac_products_measure(&test) == SPAC_OK);
    CHECK(test.contention_s >= 0);
    const std::string missing = temp.path + ".missing";
    reads.path = missing.c_str();
    CHECK(spac_products_measure(&test) == SPAC_E_IO);
    CHECK(std::string(spac_last_error()).find(missing) != std::string::npos);
    reads.depth = 0;
    CHECK(spac_products_measure(&test) == SPAC_E_ARGUMENT);
}

TEST_CASE("products that cannot be are refused") {
    spac_products test{};
    test.struct_size = sizeof test;
    test.type        = GGML_TYPE_Q4_0;
    test.n_columns   = 33;  // not whole blocks
    test.n_rows = test.n_experts = test.n_tokens = test.n_threads = test.n_ops = 1;
    CHECK(spac_products_measure(&test) == SPAC_E_ARGUMENT);
    test.n_columns = 32;
    for (int type : { -1, 4, 26, 9999 }) {  // none, gone, whole numbers, none
        test.type = type;
        CHECK(spac_products_measure(&test) == SPAC_E_ARGUMENT);
    }
}

TEST_CASE("threads and memory are timed") {
    double value = 0;
    CHECK(spac_wakeup_measure(5, &value) == SPAC_OK);
    CHECK(value > 0);
    CHECK(spac_bandwidth_measure(1 << 20, 2, &value) == SPAC_OK);
    CHECK(value > 0);
    CHECK(spac_wakeup_measure(0, &value) == SPAC_E_ARGUMENT);
    CHECK(spac_bandwidth_measure(0, 1, &value) == SPAC_E_ARGUMENT);
}
