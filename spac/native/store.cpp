#include "store.h"

#include "error.h"
#include "include/spac.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <set>
#include <stdexcept>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#    define MADV_POPULATE_READ 22  // Linux 5.14
#endif

namespace spac {

size_t kernel_page_size() {
    static const size_t size = (size_t) sysconf(_SC_PAGESIZE);
    return size;
}

size_t page_size() {
    static const size_t size = [] {
        const char * text   = std::getenv("SPAC_PAGE_BYTES");
        char *       end    = nullptr;
        const size_t wanted = text ? (size_t) std::strtoull(text, &end, 10) : 0;
        return end && *end == 0 && wanted > kernel_page_size() && (wanted & (wanted - 1)) == 0 ? wanted : kernel_page_size();
    }();
    return size;
}

size_t huge_page_size() {
    static const size_t size = [] {
        const std::string folder = "/sys/kernel/mm/transparent_hugepage/";
        std::string       enabled;
        size_t            bytes = 0;
        std::ifstream(folder + "hpage_pmd_size") >> bytes;
        std::getline(std::ifstream(folder + "enabled"), enabled);
        return enabled.find("[never]") == std::string::npos ? bytes : 0;
    }();
    return size;
}

size_t even_piece(size_t length, size_t unit, size_t most) {
    const size_t n_units  = (length + unit - 1) / unit, most_units = std::max<size_t>(1, most / unit);
    const size_t n_pieces = std::max<size_t>(1, (n_units + most_units - 1) / most_units);
    return std::max<size_t>(1, (n_units + n_pieces - 1) / n_pieces) * unit;
}

int populate_pages(void * address, size_t length) {
    return madvise(address, length, MADV_POPULATE_READ) == 0 ? 0 : errno;
}

//
// ModelFile
//

static int64_t mtime_ns(const struct stat & st) {
    return (int64_t) st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec;
}

ModelFile::~ModelFile() {
    if (fd >= 0) {
        close(fd);
    }
}

int ModelFile::remember() {
    struct stat st;
    if (fstat(fd, &st) != 0) {
        return errno;
    }
    size     = (uint64_t) st.st_size;
    inode    = st.st_ino;
    device   = st.st_dev;
    mtime_ns = spac::mtime_ns(st);
    return 0;
}

bool ModelFile::changed() const {
    struct stat st;
    return stat(path.c_str(), &st) != 0 || (uint64_t) st.st_size != size || st.st_ino != inode || st.st_dev != device ||
           spac::mtime_ns(st) != mtime_ns;
}

static int open_with(ModelFile & file, int flags) {
    file.fd = open(file.path.c_str(), O_RDONLY | O_CLOEXEC | flags);
    return file.fd < 0 ? errno : file.remember();
}

//
// what most stores have in common
//

std::shared_ptr<uint8_t> Store::map(const ModelFile &, size_t, uint64_t) const {
    return nullptr;
}

ReadResult Store::read(const ModelFile & file, void * address, size_t length, uint64_t offset, const Arrangement * arrangement) {
    const ReadResult result = read_in_place(file, address, length, offset);
    if (arrangement && result.os_error == 0) {
        arrangement->put(address, address, length);
    }
    return result;
}

//
// direct: O_DIRECT by way of a huge page, or into place, block boundaries that a neighbour shares through a bounce block
//

namespace {

// Where direct reads arrive: half a huge page for each reading thread, its own for good. A device is told of one piece of memory
// instead of hundreds of small pages, which a virtual disk takes more than twice as long for (docs/benchmarks/paging/table.md).
class Landing {
  public:
    static constexpr size_t size = 1 << 20;

    Landing() {
        if (huge_page_size() != 2 * size) {
            return;
        }
        std::lock_guard<std::mutex> lock(mutex());
        if (free_halves().empty()) {
            void * const all = mmap(nullptr, 4 * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (all == MAP_FAILED) {
                return;
            }
            char * const page = (char *) align_up((uintptr_t) all, 2 * size);
            munmap(all, (size_t) (page - (char *) all));
            munmap(page + 2 * size, (size_t) ((char *) all + 2 * size - page));
            madvise(page, 2 * size, MADV_HUGEPAGE);
            madvise(page, 2 * size, MADV_DONTFORK);
            madvise(page, 2 * size, MADV_DONTDUMP);  // tells it from slots in smaps, too
            free_halves() = { page, page + size };
        }
        data = *free_halves().begin();
        free_halves().erase(data);
        std::memset(data, 0, size);
    }
    Landing(const Landing &) = delete;
    ~Landing() {
        if (!data) {
            return;
        }
        std::lock_guard<std::mutex> lock(mutex());
        char * const page = (char *) align_down((uintptr_t) data, 2 * size), * const other = page == data ? page + size : page;
        if (free_halves().erase(other) > 0) {
            munmap(page, 2 * size);
        } else {
            free_halves().insert(data);
        }
    }

    static Landing & of_thread() {
        static thread_local Landing landing;
        return landing;
    }

    char * data = nullptr;  // null: no huge pages of that size here

  private:
    // never destroyed: threads may end later
    static std::mutex & mutex() {
        static auto * const all = new std::mutex;
        return *all;
    }
    static std::set<char *> & free_halves() {
        static auto * const all = new std::set<char *>;
        return *all;
    }
};

// Two bounce blocks for each reading thread.
struct Bounce {
    char * head;
    char * tail;
    size_t size;

    Bounce() : size(2 * page_size() + 65536) {
        head = (char *) std::aligned_alloc(65536, align_up(size, 65536));
        tail = (char *) std::aligned_alloc(65536, align_up(size, 65536));
    }
    ~Bounce() {
        std::free(head);
        std::free(tail);
    }
};

class DirectStore : public Store {
  public:
    int id() const override { return SPAC_STORE_DIRECT; }

    int open(ModelFile & file) const override {
        const int error = open_with(file, O_DIRECT);
        if (error != 0) {
            return error;
        }
        file.align = direct_alignment(file.fd);
        // some file systems accept the flag and refuse the read
        void * block = std::aligned_alloc(65536, 65536);
        const ssize_t n = pread(file.fd, block, file.align, 0);
        const int read_error = n < 0 ? errno : 0;
        std::free(block);
        return read_error;
    }

    void begin_thread() const override { Landing::of_thread(); }

    ReadResult read(const ModelFile & file, void * address, size_t length, uint64_t offset, const Arrangement * arrangement) override {
        char * const landing = Landing::of_thread().data;
        const size_t unit = arrangement ? arrangement->unit_bytes() : 1, most = Landing::size - 2 * file.align;
        if (!landing || unit > most) {
            return Store::read(file, address, length, offset, arrangement);
        }
        const size_t piece_bytes = even_piece(length, unit, most);
        ReadResult result;
        for (size_t done = 0; done < length; done += piece_bytes) {
            const uint64_t first = offset + done, until = std::min(first + piece_bytes, offset + length);
            const uint64_t block = align_down(first, file.align);
            struct iovec   piece = { landing, (size_t) (align_up(until, file.align) - block) };
            result.bytes += piece.iov_len;
            result.os_error = read_fully(file, &piece, 1, block, until);
            if (result.os_error != 0) {
                break;
            }
            if (arrangement) {
                arrangement->put((char *) address + done, landing + (first - block), until - first);
            } else {
                std::memcpy((char *) address + done, landing + (first - block), until - first);
            }
        }
        return result;
    }

    ReadResult read_in_place(const ModelFile & file, void * address, size_t length, uint64_t offset) override {
        static thread_local Bounce bounce;
        const uintptr_t begin = (uintptr_t) address, end = begin + length;
        // whole pages are read in place; what shares a page with another piece, which may be in use, is not a target for DMA
        const uintptr_t body_begin = align_up(begin, page_size()), body_end = align_down(end, page_size());
        const uint64_t read_begin = align_down(offset, file.align), read_end = align_up(offset + length, file.align);

        ReadResult result;
        result.bytes = read_end - read_begin;
        if (body_begin >= body_end) {
            struct iovec all = { bounce.head, (size_t) (read_end - read_begin) };
            result.os_error = read_fully(file, &all, 1, read_begin, offset + length);
            if (result.os_error == 0) {
                std::memcpy(address, bounce.head + (offset - read_begin), length);
            }
            return result;
        }
        const uint64_t body_offset = offset + (body_begin - begin), body_end_offset = offset + (body_end - begin);
        struct iovec parts[3] = {
            { bounce.head, (size_t) (body_offset - read_begin) },
            { (void *) body_begin, (size_t) (body_end - body_begin) },
            { bounce.tail, (size_t) (read_end - body_end_offset) },
        };
        result.os_error = read_fully(file, parts, 3, read_begin, offset + length);
        if (result.os_error == 0) {
            std::memcpy(address, bounce.head + (offset - read_begin), body_begin - begin);
            std::memcpy((void *) body_end, bounce.tail, end - body_end);
        }
        return result;
    }

  private:
    static size_t direct_alignment(int fd) {
#ifdef STATX_DIOALIGN
        struct statx stx;
        if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) == 0 && (stx.stx_mask & STATX_DIOALIGN) && stx.stx_dio_offset_align > 0) {
            const size_t align = stx.stx_dio_offset_align > stx.stx_dio_mem_align ? stx.stx_dio_offset_align : stx.stx_dio_mem_align;
            return align < page_size() ? align : page_size();
        }
#else
        (void) fd;
#endif
        return 4096 < page_size() ? 4096 : page_size();
    }

    // Fills the parts from `offset` on. The last block may lie past the end of the file: enough is all up to `needed_end`.
    static int read_fully(const ModelFile & file, struct iovec * parts, int n_parts, uint64_t offset, uint64_t needed_end) {
        while (offset < needed_end) {
            while (n_parts > 0 && parts->iov_len == 0) {
                ++parts;
                --n_parts;
            }
            const ssize_t n = preadv(file.fd, parts, n_parts, (off_t) offset);
            if (n < 0 && (errno == EINTR || errno == EAGAIN)) {
                continue;
            }
            if (n <= 0) {
                return n < 0 ? errno : ENODATA;
            }
            offset += (uint64_t) n;
            if (offset < needed_end && offset % file.align != 0) {
                return ENODATA;  // only the end of the file cuts a block short
            }
            for (size_t left = (size_t) n; left > 0 && n_parts > 0;) {
                const size_t step = left < parts->iov_len ? left : parts->iov_len;
                parts->iov_base = (char *) parts->iov_base + step;
                parts->iov_len -= step;
                left -= step;
                if (parts->iov_len == 0) {
                    ++parts;
                    --n_parts;
                }
            }
        }
        return 0;
    }
};

//
// buffered: pread through the page cache, dropped behind
//

class BufferedStore : public Store {
  public:
    int id() const override { return SPAC_STORE_BUFFERED; }

    int open(ModelFile & file) const override {
        const int error = open_with(file, 0);
        if (error == 0) {
            posix_fadvise(file.fd, 0, 0, POSIX_FADV_RANDOM);  // no readahead beyond what is asked for
        }
        return error;
    }

    ReadResult read_in_place(const ModelFile & file, void * address, size_t length, uint64_t offset) override {
        const size_t chunk_bytes = 1 << 20;  // what may be in the page cache at a time, for each reading thread
        ReadResult result;
        char * out = (char *) address;
        while (length > 0) {
            const size_t chunk = length < chunk_bytes ? length : chunk_bytes;
            const ssize_t n = pread(file.fd, out, chunk, (off_t) offset);
            if (n < 0 && errno == EINTR) {
                continue;
            }
            if (n <= 0) {
                result.os_error = n < 0 ? errno : ENODATA;
                return result;
            }
            const uint64_t first = align_down(offset, page_size()), last = align_up(offset + (uint64_t) n, page_size());
            posix_fadvise(file.fd, (off_t) first, (off_t) (last - first), POSIX_FADV_DONTNEED);
            result.bytes += (uint64_t) n;
            out += n;
            offset += (uint64_t) n;
            length -= (size_t) n;
        }
        return result;
    }
};

//
// mmap: a shared mapping of the file; the kernel may reclaim and refault behind our back
//

class MmapStore : public Store {
  public:
    int id() const override { return SPAC_STORE_MMAP; }

    int open(ModelFile & file) const override { return open_with(file, 0); }

    bool maps() const override { return true; }

    std::shared_ptr<uint8_t> map(const ModelFile & file, size_t length, uint64_t offset) const override {
        const uint64_t first    = align_down(offset, page_size());
        const size_t   n_mapped = align_up((size_t) (offset - first) + length, page_size());
        void * const   got      = mmap(nullptr, n_mapped, PROT_READ, MAP_SHARED, file.fd, (off_t) first);
        if (got == MAP_FAILED) {
            throw std::runtime_error(os_message(file.path, "cannot be mapped", errno));
        }
        madvise(got, n_mapped, MADV_DONTFORK);
        return { (uint8_t *) got + (offset - first), [got, n_mapped](uint8_t *) { munmap(got, n_mapped); } };
    }

    ReadResult read_in_place(const ModelFile & file, void * address, size_t length, uint64_t offset) override {
        ReadResult result;
        result.bytes = length;
        struct stat st;
        if (fstat(file.fd, &st) != 0 || offset + length > (uint64_t) st.st_size) {
            result.os_error = ENODATA;  // touching a page past the end would be a SIGBUS
            return result;
        }
        posix_fadvise(file.fd, (off_t) offset, (off_t) length, POSIX_FADV_WILLNEED);
        const uintptr_t first = align_down((uintptr_t) address, kernel_page_size());
        const uintptr_t last  = align_up((uintptr_t) address + length, kernel_page_size());
        if (const int error = populate_pages((void *) first, last - first); error != 0 && error != EINVAL) {
            result.os_error = error == EFAULT ? EIO : error;
            return result;
        }
        for (uintptr_t page = first; page < last; page += kernel_page_size()) {  // before Linux 5.14, or where an emulator ignores advice
            (void) *(volatile const char *) page;
        }
        return result;
    }

    void drop(const ModelFile & file, void * address, size_t length, uint64_t offset) const override {
        madvise(address, length, MADV_DONTNEED);
        posix_fadvise(file.fd, (off_t) offset, (off_t) length, POSIX_FADV_DONTNEED);
    }
};

}  // namespace

//
// mock
//

class MockStore : public BufferedStore {
  public:
    int id() const override { return SPAC_STORE_MOCK; }

    ReadResult read_in_place(const ModelFile & file, void * address, size_t length, uint64_t offset) override {
        const int n = n_reads_++;
        if (n >= first_bad_ && n - first_bad_ < n_bad_) {
            ReadResult result;
            result.os_error = os_error_;
            return result;
        }
        return BufferedStore::read_in_place(file, address, length, offset);
    }

    void fail_reads(int after, int count, int os_error) {
        n_bad_ = 0;  // no failure while the rest is being set
        os_error_  = os_error;
        first_bad_ = n_reads_ + after;
        n_bad_     = count;
    }

  private:
    std::atomic<int> n_reads_{ 0 }, first_bad_{ 0 }, n_bad_{ 0 }, os_error_{ 0 };
};

void mock_fail_reads(Store & store, int after, int count, int os_error) {
    if (auto * mock = dynamic_cast<MockStore *>(&store)) {
        mock->fail_reads(after, count, os_error);
    }
}

std::unique_ptr<Store> make_store(int id) {
    switch (id) {
        case SPAC_STORE_DIRECT:
            return std::make_unique<DirectStore>();
        case SPAC_STORE_BUFFERED:
            return std::make_unique<BufferedStore>();
        case SPAC_STORE_MMAP:
            return std::make_unique<MmapStore>();
        case SPAC_STORE_MOCK:
            return std::make_unique<MockStore>();
        default:
            return nullptr;
    }
}

std::unique_ptr<Store> open_store(int wish, const std::string & path, int & os_error) {
    auto store = make_store(wish == SPAC_STORE_AUTO ? SPAC_STORE_DIRECT : wish);
    if (!store) {
        os_error = EINVAL;
        return nullptr;
    }
    ModelFile probe;
    probe.path = path;
    os_error = store->open(probe);
    if (os_error != 0 && wish == SPAC_STORE_AUTO) {  // refused, or what the other store will fail with, too
        return open_store(SPAC_STORE_BUFFERED, path, os_error);
    }
    return os_error == 0 ? std::move(store) : nullptr;
}

}  // namespace spac
