#include "simulate.h"

#include "policy.h"

#include <algorithm>
#include <deque>
#include <limits>
#include <memory>
#include <unordered_set>
#include <utility>
#include <vector>

namespace spac {

namespace {

struct Bundles {
    int n_layers, n_experts;

    int layer(int bundle) const { return bundle / n_experts; }
    int expert(int bundle) const { return bundle % n_experts; }
    int at(int layer, int expert) const { return layer * n_experts + expert; }
    int size() const { return n_layers * n_experts; }
};

// One layer's turn in one ubatch.
struct Visit {
    uint64_t             number;   // ubatch * n_layers + layer
    int                  layer;
    std::vector<int32_t> experts;  // without repetition, ascending
    std::vector<int32_t> touched;  // of each: when it was named last, counted within the visit
    uint64_t             first_token, n_tokens;
};

// Decides what leaves a cache.
class Order {
  public:
    virtual ~Order() = default;
    virtual void foresee(const Visit &) {}           // a ubatch begins: what is expected of it
    virtual void begin(const Visit & visit) = 0;     // what is used; hits were counted
    virtual void insert(int bundle) = 0;
    virtual void remove(int) {}                      // it was not read to its end
    virtual int  evict(const std::vector<uint8_t> & in_use, int layer) = 0;  // layer -1: any. A bundle, or -1
    virtual int  evict_for(int, const std::vector<uint8_t> &, int) { return -1; }  // what is worth less than this bundle
};

// The pager's.
class DefaultOrder : public Order {
  public:
    DefaultOrder(const spac_simulation & s, Bundles bundles)
        : s_(s), bundles_(bundles), policy_(std::vector<int>((size_t) bundles.n_layers, bundles.n_experts)) {}

    void foresee(const Visit & visit) override {
        const float * of_token = s_.foresight + visit.first_token * 3 * (uint64_t) bundles_.size();
        if (of_token[0] < 0) {
            return;
        }
        for (int layer = 0; layer < bundles_.n_layers; ++layer) {
            const float * of_layer = of_token + bundles_.at(layer, 0);
            policy_.foresee(layer, of_layer, of_layer + bundles_.size(), of_layer + 2 * bundles_.size());
        }
    }
    void begin(const Visit & visit) override {
        policy_.begin(visit.layer);
        policy_.use_ubatch(visit.layer, visit.experts, (int64_t) visit.n_tokens, s_.n_used, [&](int64_t token, int i) {
            return s_.ids[((visit.first_token + (uint64_t) token) * (uint64_t) s_.n_layers + (uint64_t) visit.layer) * (uint64_t) s_.n_used + (uint64_t) i];
        });
    }
    void insert(int bundle) override { policy_.set_present(bundles_.layer(bundle), bundles_.expert(bundle), true); }
    void remove(int bundle) override { policy_.set_present(bundles_.layer(bundle), bundles_.expert(bundle), false); }
    int  evict(const std::vector<uint8_t> & in_use, int layer) override {
        return evict_below(std::numeric_limits<double>::infinity(), in_use, layer);
    }
    int  evict_for(int bundle, const std::vector<uint8_t> & in_use, int layer) override {
        return evict_below(policy_.worth(bundles_.layer(bundle), bundles_.expert(bundle)), in_use, layer);
    }

  private:
    int evict_below(double worth, const std::vector<uint8_t> & in_use, int layer) {
        const Policy::Victim victim = policy_.cheapest([&](int l, int e) { return !in_use[bundles_.at(l, e)]; }, layer);
        if (victim.layer < 0 || victim.worth >= worth) {
            return -1;
        }
        policy_.set_present(victim.layer, victim.expert, false);
        return bundles_.at(victim.layer, victim.expert);
    }
    const spac_simulation & s_;
    Bundles                 bundles_;
    Policy                  policy_;
};

// LRU, LFU, static and MIN: each bundle has a score, the lowest leaves.
class ScoreOrder : public Order {
  public:
    explicit ScoreOrder(Bundles bundles) : bundles_(bundles), score_(bundles.size(), 0), by_layer_(bundles.n_layers) {}

    void begin(const Visit & visit) override {
        for (size_t i = 0; i < visit.experts.size(); ++i) {
            double & score = score_[bundles_.at(visit.layer, visit.experts[i])];
            score = next_score(score, visit, i);
        }
    }
    void insert(int bundle) override { by_layer_[bundles_.layer(bundle)].push_back(bundle); }
    int  evict(const std::vector<uint8_t> & in_use, int layer) override {
        int best = -1;
        for (int l = layer < 0 ? 0 : layer; l < (layer < 0 ? bundles_.n_layers : layer + 1); ++l) {
            for (int bundle : by_layer_[l]) {
                if (!in_use[bundle] && (best < 0 || score_[bundle] < score_[best])) {
                    best = bundle;
                }
            }
        }
        if (best >= 0) {
            auto & present = by_layer_[bundles_.layer(best)];
            present.erase(std::find(present.begin(), present.end(), best));
        }
        return best;
    }

  protected:
    virtual double next_score(double score, const Visit & visit, size_t i) = 0;  // of visit.experts[i]

    Bundles                       bundles_;
    std::vector<double>           score_;

  private:
    std::vector<std::vector<int>> by_layer_;  // present ones
};

struct Lru : ScoreOrder {
    using ScoreOrder::ScoreOrder;
    double next_score(double, const Visit & visit, size_t i) override { return (double) visit.number * 0x1p24 + visit.touched[i]; }
};

struct Lfu : ScoreOrder {
    using ScoreOrder::ScoreOrder;
    double next_score(double score, const Visit &, size_t) override { return score + 1; }
};

// Scores are each bundle's uses in the whole replay, known beforehand: the most used ones stay.
struct Static : ScoreOrder {
    Static(Bundles bundles, const std::vector<Visit> & visits) : ScoreOrder(bundles) {
        for (const Visit & visit : visits) {
            for (int32_t e : visit.experts) {
                ++score_[bundles_.at(visit.layer, e)];
            }
        }
    }
    double next_score(double score, const Visit &, size_t) override { return score; }
};

// Belady's MIN: what is used again last leaves, known beforehand. No other order misses fewer bundles.
class Min : public ScoreOrder {
  public:
    Min(Bundles bundles, const std::vector<Visit> & visits) : ScoreOrder(bundles), next_use_(visits.size()) {
        std::vector<double> next((size_t) bundles_.size(), 1e300);
        for (size_t v = visits.size(); v-- > 0;) {
            for (int32_t e : visits[v].experts) {
                double & use = next[bundles_.at(visits[v].layer, e)];
                next_use_[v].push_back(use);
                use = (double) visits[v].number;
            }
        }
    }
    double next_score(double, const Visit & visit, size_t i) override { return -next_use_[visit.number][i]; }

  private:
    std::vector<std::vector<double>> next_use_;  // [visit][of experts]
};

// S3-FIFO (Yang et al., SOSP 2023): a small queue on probation, a main one, and a memory of what left the small one.
class S3Fifo : public Order {
  public:
    S3Fifo(Bundles bundles, bool by_layer, const std::vector<uint64_t> & capacity)
        : bundles_(bundles), uses_(bundles.size(), 0), caches_(capacity.size()), by_layer_(by_layer), present_(bundles.size(), 0) {
        for (size_t i = 0; i < capacity.size(); ++i) {
            caches_[i].small_size = std::max<size_t>(1, capacity[i] / 10);
            caches_[i].ghost_size = capacity[i];
        }
    }
    void begin(const Visit & visit) override {
        for (int32_t e : visit.experts) {
            const int bundle = bundles_.at(visit.layer, e);
            uses_[bundle] = present_[bundle] ? std::min(3, uses_[bundle] + 1) : 0;
        }
    }
    void insert(int bundle) override {
        Cache & cache = caches_[by_layer_ ? bundles_.layer(bundle) : 0];
        present_[bundle] = 1;
        (cache.ghosts.count(bundle) ? cache.main : cache.small).push_back(bundle);
    }
    int evict(const std::vector<uint8_t> & in_use, int layer) override {
        Cache & cache = caches_[layer < 0 ? 0 : layer];
        for (size_t tries = 5 * (cache.small.size() + cache.main.size()); tries-- > 0;) {
            const bool from_small = cache.main.empty() || cache.small.size() >= cache.small_size;
            auto & queue = from_small ? cache.small : cache.main;
            if (queue.empty()) {
                return -1;
            }
            const int bundle = queue.front();
            queue.pop_front();
            if (in_use[bundle]) {
                cache.main.push_back(bundle);
            } else if (from_small && uses_[bundle] > 1) {
                uses_[bundle] = 0;
                cache.main.push_back(bundle);
            } else if (!from_small && uses_[bundle] > 0) {
                --uses_[bundle];
                cache.main.push_back(bundle);
            } else {
                if (from_small) {
                    remember(cache, bundle);
                }
                present_[bundle] = 0;
                return bundle;
            }
        }
        return -1;
    }

  private:
    struct Cache {
        std::deque<int>         small, main, ghost_queue;
        std::unordered_set<int> ghosts;
        size_t                  small_size = 1, ghost_size = 1;
    };

    static void remember(Cache & cache, int bundle) {
        if (cache.ghosts.insert(bundle).second) {
            cache.ghost_queue.push_back(bundle);
        }
        if (cache.ghost_queue.size() > cache.ghost_size) {
            cache.ghosts.erase(cache.ghost_queue.front());
            cache.ghost_queue.pop_front();
        }
    }

    Bundles              bundles_;
    std::vector<int>     uses_;
    std::vector<Cache>   caches_;
    bool                 by_layer_;
    std::vector<uint8_t> present_;
};

std::vector<Visit> visits_of(const spac_simulation & s) {
    std::vector<Visit> visits;
    std::vector<int32_t> touched((size_t) s.n_experts);
    uint64_t ubatch = 0;
    for (uint64_t first = 0, end; first < s.n_tokens; first = end, ++ubatch) {
        end = first + 1;
        while (s.ubatch && end < s.n_tokens && s.ubatch[end] == s.ubatch[first]) {
            ++end;
        }
        for (int layer = 0; layer < s.n_layers; ++layer) {
            std::fill(touched.begin(), touched.end(), -1);
            for (uint64_t token = first; token < end; ++token) {
                for (int i = 0; i < s.n_used; ++i) {
                    const uint16_t e = s.ids[(token * (uint64_t) s.n_layers + (uint64_t) layer) * (uint64_t) s.n_used + (uint64_t) i];
                    if (e < s.n_experts) {
                        touched[e] = (int32_t) (token - first) * s.n_used + i;
                    }
                }
            }
            Visit visit{ ubatch * (uint64_t) s.n_layers + (uint64_t) layer, layer, {}, {}, first, end - first };
            for (int e = 0; e < s.n_experts; ++e) {
                if (touched[(size_t) e] >= 0) {
                    visit.experts.push_back(e);
                    visit.touched.push_back(touched[(size_t) e]);
                }
            }
            visits.push_back(std::move(visit));
        }
    }
    return visits;
}

std::unique_ptr<Order> make_order(const spac_simulation & s, Bundles bundles, const std::vector<Visit> & visits,
                                  const std::vector<uint64_t> & capacity) {
    switch (s.policy) {
        case SPAC_POLICY_LRU:    return std::make_unique<Lru>(bundles);
        case SPAC_POLICY_LFU:    return std::make_unique<Lfu>(bundles);
        case SPAC_POLICY_STATIC: return std::make_unique<Static>(bundles, visits);
        case SPAC_POLICY_S3FIFO: return std::make_unique<S3Fifo>(bundles, s.by_layer != 0, capacity);
        case SPAC_POLICY_MIN:    return std::make_unique<Min>(bundles, visits);
        default:                 return std::make_unique<DefaultOrder>(s, bundles);
    }
}

// What is there.
class Cache {
  public:
    Cache(const spac_simulation & s, Bundles bundles, const std::vector<uint64_t> & capacity, Order & order)
        : in_use(bundles.size(), 0), guessed(bundles.size(), 0), bundles_(bundles), by_layer_(s.by_layer != 0), capacity_(capacity),
          held_(capacity.size(), 0), present_(bundles.size(), 0), order_(order) {}

    bool has(int bundle) const { return present_[bundle]; }
    // A bundle comes in: false if all places are in use, or what is there is worth more than a guess.
    bool take_in(int bundle, bool guess = false) {
        const int layer = by_layer_ ? bundles_.layer(bundle) : -1;
        uint64_t & held = held_[by_layer_ ? layer : 0];
        if (held == capacity_[by_layer_ ? layer : 0]) {
            const int victim = guess ? order_.evict_for(bundle, in_use, layer) : order_.evict(in_use, layer);
            if (victim < 0) {
                return false;
            }
            present_[victim] = 0;
            --held;
            wasted_bytes += std::exchange(guessed[victim], 0);
        }
        present_[bundle] = 1;
        ++held;
        order_.insert(bundle);
        return true;
    }

    void drop(int bundle) {
        present_[bundle] = 0;
        --held_[by_layer_ ? bundles_.layer(bundle) : 0];
        order_.remove(bundle);
        wasted_bytes += std::exchange(guessed[bundle], 0);
    }

    std::vector<uint8_t> in_use;   // by the layer being computed, or being read
    std::vector<double>  guessed;  // bytes of bundles that were read for a guess, and not used yet
    double               wasted_bytes = 0;  // of those that left unused

  private:
    Bundles               bundles_;
    bool                  by_layer_;
    std::vector<uint64_t> capacity_, held_;
    std::vector<uint8_t>  present_;
    Order &               order_;
};

// Reads what is expected, the layers in turn, while nothing is demanded.
class ReadingAhead {
  public:
    ReadingAhead(const spac_simulation & s, Bundles bundles, Cache & cache) : s_(s), bundles_(bundles), cache_(cache), left_(bundles.size(), 0) {}

    // Before a layer chooses. Returns how much was read.
    double read(const Visit & visit) {
        interrupted_ = false;
        const float * now = s_.foresight + visit.first_token * 3 * (uint64_t) bundles_.size();
        if (now[0] < 0) {
            return 0;
        }
        double room = idle_ + s_.idle_bytes;
        const double begin = room;
        for (int layer = visit.layer; layer < std::min(s_.n_layers, visit.layer + s_.ahead_layers) && room > 0; ++layer) {
            for (int bundle : expected(layer, now)) {
                if (!cache_.has(bundle) && cache_.take_in(bundle, true)) {
                    cache_.in_use[bundle] = 1;
                    left_[bundle] = (double) s_.bundle_bytes[layer];
                }
                const double n = std::min(room, left_[bundle]);
                left_[bundle] -= n;
                cache_.guessed[bundle] += n;
                room -= n;
                if (left_[bundle] == 0) {
                    cache_.in_use[bundle] = 0;
                }
                if (room == 0) {
                    interrupted_ = left_[bundle] > 0;
                    break;
                }
            }
        }
        return begin - room;
    }
    // It has chosen: what is still to be read of a bundle that is there; it is demanded now.
    double demand(int bundle) {
        cache_.guessed[bundle] = 0;
        return std::exchange(left_[bundle], 0);
    }
    // What was read of this layer in vain is not gone on with. Returns what a demand waits for besides, a piece in flight.
    double stop(const Visit & visit, double wait_bytes) {
        bool wrong = false;
        for (int e = 0; e < s_.n_experts; ++e) {
            const int bundle = bundles_.at(visit.layer, e);
            if (std::exchange(left_[bundle], 0) > 0) {
                wrong = true;
                cache_.in_use[bundle] = 0;
                cache_.drop(bundle);
            }
        }
        const double piece = interrupted_ && wrong && wait_bytes > 0 ? std::min((double) s_.bundle_bytes[visit.layer], piece_bytes) : 0;
        idle_ = std::max(0.0, s_.idle_use_bytes * (double) visit.experts.size() - wait_bytes - piece);
        idle_ = visit.layer + 1 < s_.n_layers ? idle_ : 0;  // what comes after the last layer is not known yet
        return piece;
    }

  private:
    static constexpr double piece_bytes = 1 << 20;  // the pager reads guesses in such pieces

    std::vector<int> expected(int layer, const float * now) const {
        std::vector<int> found;
        for (int e = 0; e < s_.n_experts; ++e) {
            const int bundle = bundles_.at(layer, e);
            if (now[bundle] >= s_.read_from && (!cache_.has(bundle) || left_[bundle] > 0)) {
                found.push_back(bundle);
            }
        }
        std::stable_sort(found.begin(), found.end(), [&](int a, int b) { return now[a] > now[b]; });
        return found;
    }

    const spac_simulation & s_;
    Bundles                 bundles_;
    Cache &                 cache_;
    std::vector<double>     left_;  // of bundles being read
    double                  idle_ = 0;
    bool                    interrupted_ = false;
};

}  // namespace

void simulate(spac_simulation & s) {
    const Bundles bundles{ s.n_layers, s.n_experts };
    const std::vector<Visit> visits = visits_of(s);
    std::vector<uint64_t> capacity(s.by_layer ? (size_t) s.n_layers : 1, s.n_bundles);
    for (size_t i = 0; s.by_layer && i < capacity.size(); ++i) {
        capacity[i] = s.n_bundles / capacity.size() + (i < s.n_bundles % capacity.size() ? 1 : 0);
        capacity[i] = s.layer_bundles ? s.layer_bundles[i] : capacity[i];
    }
    const std::unique_ptr<Order> order = make_order(s, bundles, visits, capacity);
    Cache            cache(s, bundles, capacity, *order);
    ReadingAhead     ahead(s, bundles, cache);
    std::vector<int> missed;
    s.hits = s.misses = s.bytes = 0;
    s.n_ubatches = visits.size() / (uint64_t) s.n_layers;
    for (const Visit & visit : visits) {
        if (s.foresight && visit.layer == 0) {
            order->foresee(visit);
        }
        const double read_bytes = s.foresight && s.ahead_layers > 0 ? ahead.read(visit) : 0;
        missed.clear();
        double   wait_bytes = 0;
        uint64_t n_missed   = 0;
        for (int32_t e : visit.experts) {
            const int bundle = bundles.at(visit.layer, e);
            cache.in_use[(size_t) bundle] = 1;
            const bool   there = cache.has(bundle);
            const double left  = there ? ahead.demand(bundle) : (double) s.bundle_bytes[visit.layer];
            wait_bytes += left;
            n_missed += !there || left > 0;
            if (!there) {
                missed.push_back(bundle);
            }
        }
        s.hits += visit.experts.size() - n_missed;
        s.misses += n_missed;
        s.bytes += n_missed * s.bundle_bytes[visit.layer];
        if (s.visit_uses) {
            s.visit_uses[visit.number] = (uint16_t) visit.experts.size();
        }
        if (s.visit_misses) {
            s.visit_misses[visit.number] = (uint16_t) n_missed;
        }
        if (s.ahead_layers > 0) {
            wait_bytes += ahead.stop(visit, wait_bytes);
        }
        if (s.visit_wait_bytes) {
            s.visit_wait_bytes[visit.number] = wait_bytes;
        }
        if (s.visit_ahead_bytes) {
            s.visit_ahead_bytes[visit.number] = read_bytes;
        }
        order->begin(visit);
        for (int bundle : missed) {
            cache.take_in(bundle);  // where all places are in use it passes through
        }
        for (int32_t e : visit.experts) {
            cache.in_use[(size_t) bundles.at(visit.layer, e)] = 0;
        }
        if (s.visit_wasted_bytes) {
            s.visit_wasted_bytes[visit.number] = std::exchange(cache.wasted_bytes, 0);
        }
    }
}

}  // namespace spac
