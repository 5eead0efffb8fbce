//! The names by which the whole program speaks of requests, workers, pools and tenants.
//!
//! Whoever announces a thing picks its number; the core only asks that a number is not reused while the thing lives.

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id!(
    /// One request of a client, from its arrival to its end, over all attempts.
    RequestId(u64),
    "request-"
);
id!(
    /// One engine instance that requests are sent to.
    WorkerId(u32),
    "worker-"
);
id!(
    /// One GPU, or an instance of one.
    GpuId(u32),
    "gpu-"
);
id!(
    /// One LoRA adapter of a pool's model.
    AdapterId(u32),
    "adapter-"
);
id!(
    /// The workers that serve one model.
    PoolId(u32),
    "pool-"
);
id!(
    /// Who pays and who is treated fairly.
    TenantId(u32),
    "tenant-"
);
id!(
    /// Kind of request (chat, completions, …): what is asked in one way is answered at like length.
    RouteId(u32),
    "route-"
);
