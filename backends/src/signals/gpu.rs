//! What the GPUs of a machine say of themselves: read from NVML there, and followed from elsewhere.
//!
//! [`read_here`] reads the GPUs of this machine; [`agent`] serves that over gRPC (`forebay.telemetry.v1`), and
//! [`Follower`] is the gateway's end of it, or of the same readings in the same process. All of them speak of
//! [`Snapshot`]s. What one means for placement is said here once: [`slowdown`], [`fault`].
//!
//! Invariants: everything works with no driver and no GPU; every field may be missing; a GPU whose driver call hangs is
//! reported silent and delays no other.
//!
//! Not here: which worker runs on which GPU (the gateway, from the ports that processes listen on), and what is done
//! about any of it (`forebay-scheduler`).

pub mod agent;
mod follow;
mod node;
mod nvml;
mod processes;

pub use follow::{Follower, NodeSignal, Source};
pub use node::{Readings, read_here};
pub use wire::{Gpu, Process, Snapshot, Standing, Xid};

/// The protocol as it is generated.
#[allow(clippy::all, clippy::allow_attributes_without_reason, missing_docs, unreachable_pub, reason = "generated code")]
pub mod wire {
    tonic::include_proto!("forebay.telemetry.v1");
}

/// XIDs after which a GPU's results or its life cannot be trusted: double-bit ECC (48), rows that could not be remapped
/// (63, 64), NVLink (74), fallen off the bus (79), ECC errors contained and not (94, 95), a GSP that does not answer
/// (119, 120). Others are usually the application's own (13, 31, 43, 45).
const FATAL_XIDS: [u64; 9] = [48, 63, 64, 74, 79, 94, 95, 119, 120];

/// Reasons for which clocks are held below what the work could use: hardware slowdown (0x8), software (0x20) and hardware
/// (0x40) thermal slowdown, power brake (0x80). The power cap (0x4) is normal under full load and stands in the measured
/// speed already.
const THROTTLES: u64 = 0x8 | 0x20 | 0x40 | 0x80;
/// What a throttled GPU is assumed to do whose clocks cannot be read: hardware slowdown at least halves them.
const THROTTLED_ASSUMED: f64 = 0.5;
/// The least that a slowed GPU is taken to do.
const SLOWEST: f64 = 0.05;

/// Share of its usual speed that a GPU runs at while it is throttled or as hot as where that begins; 1 when it is not.
#[must_use]
pub fn slowdown(gpu: &Gpu) -> f64 {
    let throttled = gpu.throttle_reasons.is_some_and(|reasons| reasons & THROTTLES != 0);
    let hot = gpu.temperature_celsius.zip(gpu.slowdown_celsius).is_some_and(|(now, limit)| limit > 0 && now >= limit);
    if !throttled && !hot {
        return 1.0;
    }
    let clocks = gpu.sm_clock_mhz.zip(gpu.sm_clock_max_mhz).filter(|(_, most)| *most > 0);
    clocks.map_or(THROTTLED_ASSUMED, |(now, most)| (f64::from(now) / f64::from(most)).clamp(SLOWEST, 1.0))
}

/// Why a GPU cannot be trusted, where it cannot. Of its errors those younger than `recent_ms` count.
#[must_use]
pub fn fault(gpu: &Gpu, recent_ms: u64) -> Option<String> {
    match gpu.standing() {
        Standing::Well => {}
        Standing::Lost => return Some("lost".to_owned()),
        Standing::ResetRequired => return Some("reset required".to_owned()),
        Standing::Silent => return Some("silent".to_owned()),
    }
    let fatal = gpu.xids.iter().rev().find(|xid| xid.age_ms < recent_ms && FATAL_XIDS.contains(&xid.code));
    fatal.map(|xid| format!("xid {}", xid.code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throttling_and_heat_slow_by_the_clocks() {
        let check = |reasons, celsius, clocks: Option<(u32, u32)>, expect: f64| {
            let gpu = Gpu {
                throttle_reasons: reasons,
                temperature_celsius: celsius,
                slowdown_celsius: Some(90),
                sm_clock_mhz: clocks.map(|(now, _)| now),
                sm_clock_max_mhz: clocks.map(|(_, most)| most),
                ..Gpu::default()
            };
            assert!((slowdown(&gpu) - expect).abs() < 1e-9, "{reasons:?} {celsius:?} {clocks:?}: {}", slowdown(&gpu));
        };
        check(None, None, None, 1.0);
        check(Some(0), Some(60), Some((500, 2000)), 1.0);
        check(Some(0x1), Some(89), Some((200, 2000)), 1.0);
        check(Some(0x4), Some(70), Some((1500, 2000)), 1.0);
        check(Some(0x40), Some(70), Some((500, 2000)), 0.25);
        check(Some(0x8 | 0x4), None, None, THROTTLED_ASSUMED);
        check(Some(0x20), None, Some((0, 2000)), SLOWEST);
        check(Some(0x20), None, Some((5, 0)), THROTTLED_ASSUMED);
        check(None, Some(90), Some((1000, 2000)), 0.5);
        check(Some(0x80), None, Some((3000, 2000)), 1.0);
    }

    #[test]
    fn only_young_and_fatal_errors_are_a_fault() {
        let check = |standing: Standing, xids: &[(u64, u64)], expect: Option<&str>| {
            let xids = xids.iter().map(|(code, age_ms)| Xid { code: *code, age_ms: *age_ms }).collect();
            let gpu = Gpu { standing: standing.into(), xids, ..Gpu::default() };
            assert_eq!(fault(&gpu, 1000).as_deref(), expect, "{gpu:?}");
        };
        check(Standing::Well, &[], None);
        check(Standing::Well, &[(13, 0), (31, 0), (43, 0), (45, 0)], None);
        check(Standing::Well, &[(79, 1000)], None);
        check(Standing::Well, &[(79, 999), (13, 0)], Some("xid 79"));
        check(Standing::Well, &[(48, 10), (95, 5)], Some("xid 95"));
        check(Standing::Lost, &[], Some("lost"));
        check(Standing::ResetRequired, &[(79, 5)], Some("reset required"));
        check(Standing::Silent, &[], Some("silent"));
    }
}
