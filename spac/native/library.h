// The process-wide state behind the C ABI: one pager for all models, and the models by id.
//
// It is never destroyed: a compute or reading thread may still be in it while the process exits.
#pragma once

#include "pager.h"
#include "pressure.h"

#include <mutex>
#include <unordered_map>

namespace spac {

class Library {
  public:
    static Library & get();

    Pager pager{ 0 };

    // -- one load, on one thread: the options apply to the buffers that the thread's next model allocates --
    void begin_load(const spac_options & options);
    int  end_load();                       // id, 0 or SPAC_E_*
    std::shared_ptr<Model> loading();      // null outside a load
    void load_failed(int code, std::string line);  // the first one counts
    const spac_options & load_options() const;

    // Arranges the model and hands it to the pager; happens at the end of the load.
    int  adopt(const std::shared_ptr<Model> & model, int n_io_threads);
    void forget(const std::shared_ptr<Model> & model);
    std::shared_ptr<Model> find(int id);

    // Lets the budget follow the memory that is left; no gauges: no longer.
    void watch_pressure(std::vector<Gauge> gauges);
    uint64_t shortages() const { return shortages_; }  // times that it was short

  private:
    void look(std::optional<int64_t> spare, double now);

    std::mutex mutex_;  // never taken on the compute path
    std::unordered_map<int, std::shared_ptr<Model>> models_;
    int next_id_ = 1;
    PressureRule          rule_;            // of the watching thread, like the next
    bool                  capped_ = false;
    std::atomic<uint64_t> shortages_{ 0 };
    PressureWatch         watch_{ [this](std::optional<int64_t> spare, double now) { look(spare, now); } };
};

}  // namespace spac
