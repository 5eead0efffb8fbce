//! Whose turn it is inside one pool.
//!
//! Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): each tenant counts
//! the service it got, 1 for a prompt token that was computed and 2 for an output token, divided by its weight; among
//! the tenants that wait, the one with the smallest counter goes next. A tenant that comes back from idling is lifted
//! to the smallest counter of those waiting (or of the last one that left the queue), so idling banks no credit.
//!
//! Counters are pool-wide while queues belong to lanes: a lane asks here which of its tenants goes first.
//! Not here: the order inside a tenant (`lane`), and the classes (`shares`).

use std::collections::{BTreeMap, BTreeSet};

use crate::TenantId;

/// Service units per unweighted prompt token; keeps fractions of weights in whole numbers.
const UNITS: f64 = 256.0;
/// What an output token costs against a prompt token (the paper's 1 and 2).
const OUTPUT_COST: f64 = 2.0;
/// Tenants remembered while they wait for nothing.
const IDLE_TENANTS_MAX: usize = 16_384;

#[derive(Debug, Default)]
pub(crate) struct Fairness {
    accounts: BTreeMap<TenantId, Account>,
    /// Tenants that wait, by counter.
    waiting: BTreeSet<(u64, TenantId)>,
    /// Counter of the last tenant that left the queue.
    floor: u64,
}

#[derive(Debug)]
struct Account {
    counter: u64,
    waiting: u32,
    weight: f64,
}

impl Fairness {
    /// A request of the tenant began to wait.
    pub(crate) fn enter(&mut self, tenant: TenantId, weight: f64) {
        self.lift(tenant, weight);
        if let Some(account) = self.accounts.get_mut(&tenant) {
            account.waiting += 1;
            self.waiting.insert((account.counter, tenant));
        }
    }

    /// A request of the tenant waits no more.
    pub(crate) fn leave(&mut self, tenant: TenantId) {
        let Some(account) = self.accounts.get_mut(&tenant) else { return };
        account.waiting = account.waiting.saturating_sub(1);
        if account.waiting == 0 {
            self.waiting.remove(&(account.counter, tenant));
            self.floor = self.floor.max(account.counter);
        }
    }

    /// A request of the tenant goes to a worker, with `tokens` of its prompt to compute.
    pub(crate) fn sent(&mut self, tenant: TenantId, weight: f64, tokens: u32) {
        self.lift(tenant, weight);
        if let Some(account) = self.accounts.get(&tenant).filter(|account| account.waiting == 0) {
            self.floor = self.floor.max(account.counter);
        }
        self.charge(tenant, f64::from(tokens));
    }

    /// A send came to nothing: the tenant got no service for it.
    pub(crate) fn refunded(&mut self, tenant: TenantId, tokens: u32) {
        let refund = |weight| (f64::from(tokens) * UNITS / weight) as u64;
        self.recount(tenant, |account| account.counter.saturating_sub(refund(account.weight)));
    }

    /// A request of the tenant generated `tokens` more.
    pub(crate) fn generated(&mut self, tenant: TenantId, tokens: u32) {
        self.charge(tenant, f64::from(tokens) * OUTPUT_COST);
    }

    /// The service a tenant got so far: what its turn is decided by.
    pub(crate) fn counter(&self, tenant: TenantId) -> u64 {
        self.accounts.get(&tenant).map_or(0, |account| account.counter)
    }

    fn lift(&mut self, tenant: TenantId, weight: f64) {
        if self.accounts.len() >= IDLE_TENANTS_MAX + self.waiting.len() && !self.accounts.contains_key(&tenant) {
            self.forget_idle();
        }
        let least = self.waiting.first().map_or(self.floor, |(counter, _)| *counter);
        let account = self.accounts.entry(tenant).or_insert(Account { counter: least, waiting: 0, weight });
        account.weight = weight;
        if account.waiting == 0 {
            account.counter = account.counter.max(least);
        }
    }

    fn charge(&mut self, tenant: TenantId, cost: f64) {
        self.recount(tenant, |account| account.counter.saturating_add((cost * UNITS / account.weight) as u64));
    }

    fn recount(&mut self, tenant: TenantId, counter: impl FnOnce(&Account) -> u64) {
        let Some(account) = self.accounts.get_mut(&tenant) else { return };
        let before = account.counter;
        account.counter = counter(account);
        if account.waiting > 0 {
            self.waiting.remove(&(before, tenant));
            self.waiting.insert((account.counter, tenant));
        }
    }

    /// Drops the idle tenants; those ahead of the floor lose that debt, which keeps memory bounded.
    fn forget_idle(&mut self) {
        self.accounts.retain(|_, account| account.waiting > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: TenantId = TenantId(1);
    const B: TenantId = TenantId(2);

    #[test]
    fn service_counts_by_weight() {
        let mut fairness = Fairness::default();
        fairness.sent(A, 1.0, 100);
        fairness.generated(A, 50);
        fairness.sent(B, 2.0, 100);
        assert_eq!((fairness.counter(A), fairness.counter(B)), (200 * 256, 50 * 256));
    }

    #[test]
    fn idling_banks_no_credit() {
        let mut fairness = Fairness::default();
        fairness.enter(A, 1.0);
        fairness.sent(A, 1.0, 1000);
        fairness.enter(B, 1.0);
        assert_eq!(fairness.counter(B), fairness.counter(A), "lifted to the smallest that waits");
        fairness.leave(B);
        fairness.sent(A, 1.0, 500);
        fairness.leave(A);
        fairness.enter(B, 1.0);
        assert_eq!(fairness.counter(B), 1500 * 256, "lifted to the last that left");
    }

    #[test]
    fn a_tenant_alone_and_never_waiting_owes_nothing_to_a_newcomer() {
        let mut fairness = Fairness::default();
        for _ in 0..1000 {
            fairness.sent(A, 1.0, 1000);
        }
        fairness.enter(B, 1.0);
        fairness.enter(A, 1.0);
        let gap = fairness.counter(A) - fairness.counter(B);
        assert!(gap <= 1000 * 256, "one request's worth: {gap}");
    }

    #[test]
    fn memory_is_bounded() {
        let mut fairness = Fairness::default();
        fairness.enter(A, 1.0);
        for i in 0..100_000 {
            fairness.sent(TenantId(10 + i), 1.0, 10);
        }
        assert!(fairness.accounts.len() <= IDLE_TENANTS_MAX + 1);
        assert!(fairness.accounts.contains_key(&A));
    }
}
