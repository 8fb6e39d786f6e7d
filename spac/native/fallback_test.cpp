// What older kernels, containers and file systems refuse: the same code with the system call really refused. A seccomp filter
// holds for one thread and those that it starts, so each test is a thread. Where there is no seccomp (qemu-user), it says so.
#include "testing.h"

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

using namespace spac;
using namespace spac::testing;

#ifndef MADV_POPULATE_READ
#    define MADV_POPULATE_READ 22
#endif

// A system call that fails, if (argument & mask) == value.
struct Refused {
    const char * name;
    int          number;
    int          os_error;
    int          argument = 0;
    uint32_t     mask     = 0;
    uint32_t     value    = 0;
};

static bool refuse(const Refused & call) {
    const auto field = [](size_t offset) { return (struct sock_filter) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (uint32_t) offset); };
    const auto unless_equal = [](uint32_t value, uint8_t skip) {
        return (struct sock_filter) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, skip);
    };
    struct sock_filter program[] = {
        field(offsetof(struct seccomp_data, nr)),
        unless_equal((uint32_t) call.number, 4),
        field(offsetof(struct seccomp_data, args) + 8 * (size_t) call.argument),
        BPF_STMT(BPF_ALU | BPF_AND | BPF_K, call.mask),
        unless_equal(call.value, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (uint32_t) call.os_error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = { sizeof program / sizeof *program, program };
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

template <typename F> static void with_refused(const Refused & call, F && body) {
    std::thread([&] {
        CAPTURE(call.name);
        CAPTURE(call.os_error);
        if (refuse(call)) {
            body();
        } else {
            MESSAGE("NOT TESTED: " << call.name << " cannot be refused here, there is no seccomp");
        }
    }).join();
}

// Evictions and reads at the floor, bytes and accounts checked all along.
static void run_at_floor(TestModel & m) {
    Pager pager(m.model->floor_bytes());
    pager.add_model(m.model, 0);
    std::mt19937 random(9);
    for (int i = 0; i < 8; ++i) {
        for (int e = 0; e < 4; ++e) {
            m.prefetch(pager, (int) (random() % 2), (int) (random() % 8));
        }
        pass(pager, m, nullptr, { { (int) (random() % 4), 4 + (int) (random() % 4) } });
        check_accounts(pager, { &m });
    }
    CHECK(m.model->evictions > 10);
    CHECK(m.model->rereads > 10);
    pager.remove_model(*m.model);
    CHECK(pager.used_bytes() == 0);
}

static Shape odd_shape(int store) {
    return { 2, 2, 8, 3 * page_size() + 96, 4128, store };
}

TEST_CASE("where O_DIRECT is refused, by open or by the read, auto is buffered") {
    for (int os_error : { EINVAL, EOPNOTSUPP }) {
        for (const Refused & call : { Refused{ "O_DIRECT", SYS_openat, os_error, 2, O_DIRECT, O_DIRECT },
                                      Refused{ "a direct read", SYS_pread64, os_error, 3, ~0u, 0 } }) {  // the first one, at offset 0
            with_refused(call, [&] {
                TestModel m(odd_shape(SPAC_STORE_AUTO));
                CHECK(m.store->id() == SPAC_STORE_BUFFERED);
                run_at_floor(m);
                int wrong = 0;
                CHECK(open_store(SPAC_STORE_DIRECT, m.file.path, wrong) == nullptr);
                CHECK(wrong == os_error);
            });
        }
    }
}

TEST_CASE("where the kernel does not tell the alignment of direct reads, it is a block of 4 KiB, or a page") {
    with_refused({ "statx", SYS_statx, ENOSYS }, [] {
        TestModel m(odd_shape(SPAC_STORE_AUTO));
        if (m.store->id() != SPAC_STORE_DIRECT) {
            MESSAGE("NOT TESTED: the file system of " << m.file.path << " refuses O_DIRECT (see TMPDIR)");
            return;
        }
        CHECK(m.model->files[0]->align == std::min<size_t>(4096, page_size()));
        run_at_floor(m);
    });
}

TEST_CASE("without MADV_POPULATE_READ the mmap store touches each page") {
    with_refused({ "MADV_POPULATE_READ", SYS_madvise, EINVAL, 2, ~0u, MADV_POPULATE_READ }, [] {
        TempFile  temp(8 * page_size());
        ModelFile file;
        file.path  = temp.path;
        auto store = make_store(SPAC_STORE_MMAP);
        REQUIRE(store->open(file) == 0);
        Place place(*store, file, 8 * page_size(), 0);
        store->drop(file, place.pages, place.n_bytes, 0);
        REQUIRE(populate_pages(place.pages, place.n_bytes) == EINVAL);
        CHECK(store->read(file, place.data + page_size() / 2, 5 * page_size(), page_size() / 2).os_error == 0);
        CHECK(bytes_in_memory(place.pages, place.n_bytes) >= 6 * page_size());
        CHECK(std::memcmp(place.data, temp.bytes.data(), temp.bytes.size()) == 0);
    });
}

TEST_CASE("hints that are refused change no byte") {
    for (const Refused & call : { Refused{ "MADV_NOHUGEPAGE", SYS_madvise, EINVAL, 2, ~0u, MADV_NOHUGEPAGE },
                                  Refused{ "MADV_HUGEPAGE", SYS_madvise, EINVAL, 2, ~0u, MADV_HUGEPAGE },
                                  Refused{ "MADV_DONTFORK", SYS_madvise, EINVAL, 2, ~0u, MADV_DONTFORK },
                                  Refused{ "posix_fadvise", SYS_fadvise64, ENOSYS } }) {
        for (int store : { SPAC_STORE_AUTO, SPAC_STORE_BUFFERED, SPAC_STORE_MMAP }) {
            with_refused(call, [&] {
                TestModel m(odd_shape(store));
                run_at_floor(m);
            });
        }
    }
}
