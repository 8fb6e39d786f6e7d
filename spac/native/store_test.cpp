#include "testing.h"

#include <fcntl.h>
#include <sys/stat.h>

using namespace spac;
using namespace spac::testing;

// Calls body(store, file) with every store that this machine has, the file opened by it.
template <typename F> static void with_stores(const TempFile & temp, F && body) {
    for (int id : { SPAC_STORE_DIRECT, SPAC_STORE_BUFFERED, SPAC_STORE_MMAP, SPAC_STORE_MOCK }) {
        CAPTURE(id);
        int  os_error = 0;
        auto store    = open_store(id, temp.path, os_error);
        if (id == SPAC_STORE_DIRECT && os_error == EINVAL) {
            MESSAGE("NOT TESTED: direct reads, the file system of " << temp.path << " refuses O_DIRECT (see TMPDIR)");
            continue;
        }
        REQUIRE(store);
        ModelFile file;
        file.path = temp.path;
        REQUIRE(store->open(file) == 0);
        CHECK(store->id() == id);
        CHECK(file.size == temp.bytes.size());
        body(*store, file);
    }
}

static bool read_is_exact(Store & store, const ModelFile & file, const TempFile & temp, uint64_t offset, size_t length, bool in_place) {
    Place      place(store, file, length, offset);
    const bool fills = !store.maps();  // a mapping of the file cannot be written to, and no byte of the file is 0
    const ReadResult result = in_place ? store.read_in_place(file, place.data, length, offset) : store.read(file, place.data, length, offset);
    const uint8_t * end = place.data + length, * pages_end = place.pages + place.n_bytes;
    const auto untouched = [&](const uint8_t * first, const uint8_t * last) {
        return !fills || std::all_of(first, last, [](uint8_t byte) { return byte == 0; });
    };
    return result.os_error == 0 && result.bytes >= length && std::memcmp(place.data, &temp.bytes[offset], length) == 0 &&
           untouched(place.pages, place.data) && untouched(end, pages_end);
}

TEST_CASE("every store brings exactly the bytes asked for, wherever they begin and end") {
    const uint64_t page = page_size();
    TempFile temp(20 * page + 1234);
    const uint64_t size = temp.bytes.size();
    std::vector<std::pair<uint64_t, uint64_t>> ranges = {
        { 0, 1 },        { 32, 100 },          { page - 1, 2 },       { page, page },           { page / 2, page },
        { 32, 3 * page }, { page, 5 * page },   { page - 32, page + 64 }, { size - 1, 1 },      { size - 1300, 1300 },
        { size - 100, 100 }, { size - 3 * page, 3 * page }, { 19 * page, page + 1234 }, { 0, size },
    };
    std::mt19937 random(3);
    for (int i = 0; i < 200; ++i) {
        const uint64_t offset = random() % size;
        ranges.push_back({ offset, 1 + random() % (size - offset) });
    }
    with_stores(temp, [&](Store & store, ModelFile & file) {
        for (const auto & [offset, length] : ranges) {
            CAPTURE(offset);
            CAPTURE(length);
            CHECK(read_is_exact(store, file, temp, offset, length, false));
            CHECK(read_is_exact(store, file, temp, offset, length, true));
        }
    });
}

TEST_CASE("every store reads slices of several MiB") {
    TempFile temp((5 << 20) / 2 + 777);
    with_stores(temp, [&](Store & store, ModelFile & file) {
        for (const bool in_place : { false, true }) {
            CHECK(read_is_exact(store, file, temp, 96, temp.bytes.size() - 96, in_place));
        }
    });
}

// Turns each unit round.
struct Reversal : Arrangement {
    size_t unit;
    explicit Reversal(size_t unit) : unit(unit) {}

    size_t unit_bytes() const override { return unit; }
    void   put(void * to, const void * from, size_t length) const override {
        REQUIRE(length % unit == 0);
        for (size_t at = 0; at < length; at += unit) {
            std::vector<uint8_t> bytes((const uint8_t *) from + at, (const uint8_t *) from + at + unit);
            std::reverse_copy(bytes.begin(), bytes.end(), (uint8_t *) to + at);
        }
    }
};

TEST_CASE("bytes are arranged in whole units, however a read is cut up") {
    constexpr uint64_t offset = 4000;
    for (const size_t unit : { (size_t) 18, (size_t) 1000, (size_t) 70000, (size_t) (3 << 20) / 2 }) {  // the last is longer than a piece
        CAPTURE(unit);
        const Reversal reversal(unit);
        const size_t   length = (3 << 20) / unit * unit;
        TempFile temp(offset + length + 500);
        std::vector<uint8_t> expected(temp.bytes.begin() + offset, temp.bytes.begin() + offset + length);
        reversal.put(expected.data(), expected.data(), length);
        with_stores(temp, [&](Store & store, ModelFile & file) {
            if (store.id() == SPAC_STORE_MMAP) {
                return;  // the file's own pages
            }
            Place place(store, file, length, offset);
            REQUIRE(store.read(file, place.data, length, offset, &reversal).os_error == 0);
            CHECK(std::memcmp(place.data, expected.data(), length) == 0);
        });
    }
}

TEST_CASE("a slice that the file no longer holds is ENODATA, one that it still holds is read") {
    const uint64_t page = page_size();
    for (uint64_t left : { (uint64_t) 0, page / 2, 4 * page, 4 * page + 10, 6 * page + 1000, 8 * page - 33 }) {
        CAPTURE(left);
        TempFile temp(10 * page);
        with_stores(temp, [&](Store & store, ModelFile & file) {
            const uint64_t offset = 4 * page + 32, length = 4 * page - 64;
            Place place(store, file, length, offset);
            REQUIRE(truncate(temp.path.c_str(), (off_t) left) == 0);
            CHECK(store.read(file, place.data, length, offset).os_error == ENODATA);
            if (left > offset) {
                CHECK(store.read(file, place.data, left - offset, offset).os_error == 0);
                CHECK(std::memcmp(place.data, &temp.bytes[offset], left - offset) == 0);
            }
            TempFile again(10 * page);  // for the next store
            std::filesystem::copy_file(again.path, temp.path, std::filesystem::copy_options::overwrite_existing);
        });
    }
}

TEST_CASE("dropped pages of a mapping leave memory, their neighbours keep their bytes, and all can be read again") {
    const uint64_t page = page_size();
    TempFile temp(8 * page);
    with_stores(temp, [&](Store & store, ModelFile & file) {
        CHECK(store.maps() == (store.id() == SPAC_STORE_MMAP));
        if (!store.maps()) {
            CHECK(store.map(file, page, 0) == nullptr);
            return;
        }
        Place place(store, file, 8 * page, 0);
        REQUIRE(store.read(file, place.data, 8 * page, 0).os_error == 0);
        CHECK(bytes_in_memory(place.pages, place.n_bytes) == 8 * page);
        store.drop(file, place.pages + 3 * page, 2 * page, 3 * page);
        CHECK(std::memcmp(place.data, temp.bytes.data(), 8 * page) == 0);
        store.drop(file, place.pages, 8 * page, 0);
        CHECK(bytes_in_memory(place.pages, place.n_bytes) == 0);
        REQUIRE(store.read(file, place.data, 8 * page, 0).os_error == 0);
        CHECK(std::memcmp(place.data, temp.bytes.data(), 8 * page) == 0);
    });
}

TEST_CASE("a model file has changed once it is written to, replaced, cut or removed") {
    TempFile temp(1000), other(1000);
    const struct timespec long_ago[2] = { { 1000, 0 }, { 1000, 0 } };  // clocks of file systems are coarse
    REQUIRE(utimensat(AT_FDCWD, temp.path.c_str(), long_ago, 0) == 0);
    REQUIRE(utimensat(AT_FDCWD, other.path.c_str(), long_ago, 0) == 0);
    ModelFile file;
    file.path = temp.path;
    REQUIRE(make_store(SPAC_STORE_BUFFERED)->open(file) == 0);
    REQUIRE_FALSE(file.changed());

    SUBCASE("read") {
        std::vector<uint8_t> bytes(1000);
        REQUIRE(pread(file.fd, bytes.data(), 1000, 0) == 1000);
        CHECK_FALSE(file.changed());
    }
    SUBCASE("written to") {
        const int fd = open(temp.path.c_str(), O_WRONLY);
        REQUIRE(pwrite(fd, "x", 1, 500) == 1);
        close(fd);
        CHECK(file.changed());
    }
    SUBCASE("replaced by one of the same size and time") {
        std::filesystem::rename(other.path, temp.path);
        CHECK(file.changed());
    }
    SUBCASE("cut, its time set back") {
        REQUIRE(truncate(temp.path.c_str(), 999) == 0);
        REQUIRE(utimensat(AT_FDCWD, temp.path.c_str(), long_ago, 0) == 0);
        CHECK(file.changed());
    }
    SUBCASE("removed") {
        REQUIRE(unlink(temp.path.c_str()) == 0);
        CHECK(file.changed());
    }
}

TEST_CASE("where O_DIRECT is refused auto is buffered, and direct is EINVAL") {
    const char * refuses = "/proc/version";  // tmpfs does not refuse since Linux 6.6
    int os_error = 0;
    CHECK(open_store(SPAC_STORE_DIRECT, refuses, os_error) == nullptr);
    CHECK(os_error == EINVAL);
    auto store = open_store(SPAC_STORE_AUTO, refuses, os_error);
    REQUIRE(store);
    CHECK(os_error == 0);
    CHECK(store->id() == SPAC_STORE_BUFFERED);
}

TEST_CASE("a file that is not there is ENOENT with every store, an unknown store is EINVAL") {
    for (int id : { SPAC_STORE_AUTO, SPAC_STORE_DIRECT, SPAC_STORE_BUFFERED, SPAC_STORE_MMAP, SPAC_STORE_MOCK }) {
        int os_error = 0;
        CHECK(open_store(id, "/nowhere/model.gguf", os_error) == nullptr);
        CHECK(os_error == ENOENT);
    }
    TempFile temp(10);
    int      os_error = 0;
    CHECK(open_store(99, temp.path, os_error) == nullptr);
    CHECK(os_error == EINVAL);
}

TEST_CASE("the mock store fails the reads that it was told to fail, other stores do not listen") {
    TempFile temp(page_size());
    with_stores(temp, [&](Store & store, ModelFile & file) {
        Place place(store, file, 100, 0);
        const auto read = [&] { return store.read(file, place.data, 100, 0).os_error; };
        read();
        mock_fail_reads(store, 1, 2, EIO);
        std::vector<int> errors;
        for (int i = 0; i < 4; ++i) {
            errors.push_back(read());
        }
        CHECK(errors == (store.id() == SPAC_STORE_MOCK ? std::vector<int>{ 0, EIO, EIO, 0 } : std::vector<int>(4)));
    });
}
