// Stores: how a slice's bytes come from the file to where they are wanted.
// A store knows nothing of experts, budgets or threads; every call is safe from any thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace spac {

// The unit of budgets and slots: the kernel's page, 4 to 64 KiB. Tests make it larger than that by the environment variable
// SPAC_PAGE_BYTES, to see what a kernel with larger pages would; what is no larger power of two is ignored.
size_t page_size();
size_t kernel_page_size();
size_t huge_page_size();  // 0: the kernel has none

inline uintptr_t align_down(uintptr_t value, size_t align) {
    return value - value % align;
}

inline uintptr_t align_up(uintptr_t value, size_t align) {
    return align_down(value + align - 1, align);
}

// Into what a length of whole units is cut, so that no piece is longer than `most` unless a unit is, and all are of about one size: what
// little a last one had left would take nearly as long to read as a whole piece.
size_t even_piece(size_t length, size_t unit, size_t most);

// Reads a mapping's pages in at once; 0 or errno: EINVAL before Linux 5.14.
int populate_pages(void * address, size_t length);

// A model file that stays open while the model lives.
struct ModelFile {
    std::string path;
    int         fd    = -1;
    uint64_t    size  = 0;
    uint64_t    inode = 0;
    uint64_t    device = 0;
    int64_t     mtime_ns = 0;
    size_t      align = 4096;  // of offsets and lengths in a direct read

    ModelFile() = default;
    ModelFile(const ModelFile &) = delete;
    ModelFile & operator=(const ModelFile &) = delete;
    ~ModelFile();

    // Fills size, inode, device and mtime from the open file; 0 or errno.
    int remember();
    // Has the path come to mean another file, or has the file been written to?
    bool changed() const;
};

struct ReadResult {
    int      os_error = 0;  // 0: all bytes are there
    uint64_t bytes    = 0;  // asked of the file, alignment included
};

// What becomes of bytes when they arrive, in whole units from the beginning of a slice on.
class Arrangement {
  public:
    virtual ~Arrangement() = default;
    virtual size_t unit_bytes() const = 0;
    // `from` may be `to`. Any thread.
    virtual void put(void * to, const void * from, size_t length) const = 0;
};

class Store {
  public:
    virtual ~Store() = default;

    virtual int id() const = 0;  // SPAC_STORE_*
    // Opens file.path and fills the rest; 0 or errno (EINVAL: this file system refuses what the store needs).
    virtual int open(ModelFile & file) const = 0;
    // Whether slices are read where the file is mapped, by this: the byte at the offset, until the last copy of the pointer goes.
    // Throws if there is no address space.
    virtual bool maps() const { return false; }
    virtual std::shared_ptr<uint8_t> map(const ModelFile & file, size_t length, uint64_t offset) const;
    // Gives a mapping's whole pages back.
    virtual void drop(const ModelFile &, void * /* address */, size_t /* length */, uint64_t /* offset */) const {}
    // A thread that will read calls it first: what it needs for that is in memory from then on.
    virtual void begin_thread() const {}
    // Blocks until the bytes of [offset, offset + length) are at address, arranged if that is asked for: then it is whole units.
    // Writes no byte outside them.
    virtual ReadResult read(const ModelFile & file, void * address, size_t length, uint64_t offset, const Arrangement * arrangement = nullptr);
    // The same without a copy, where the store can; as they are in the file.
    virtual ReadResult read_in_place(const ModelFile & file, void * address, size_t length, uint64_t offset) = 0;
};

// SPAC_STORE_AUTO is not a store: see open_store().
std::unique_ptr<Store> make_store(int id);

// Finds the store for a wish (SPAC_STORE_*) by opening the file with it; auto prefers direct. null and errno on failure.
std::unique_ptr<Store> open_store(int wish, const std::string & path, int & os_error);

// Buffered, with failures to order.
class MockStore;
void mock_fail_reads(Store & store, int after, int count, int os_error);  // ignored by the other stores

}  // namespace spac
